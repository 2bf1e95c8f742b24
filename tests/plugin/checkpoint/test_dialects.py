"""Checkpoints that transformers saved: in the published names, or named with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3_plugin.checkpoint.headers import read_checkpoint
from m3_plugin.checkpoint.plan import plan_checkpoint
from m3_plugin.checkpoint.updates import VisionWeights
from m3_plugin.model.config import M3Config
from m3_plugin.model.vision import M3Vision, VisionConfig
from m3_plugin.testing.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("dialects") / "m3", preset="small")


@pytest.fixture(scope="module")
def model(written: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(written)


def planned(folder: Path, config: M3Config) -> Any:
    return plan_checkpoint(folder, config, fused={}, dequantise=False)


def test_what_transformers_saves_is_read_or_named(model: Any, tmp_path: Path) -> None:
    """Its vision tower is read; of the text, one name is wrong and the cure is said."""
    model.save_pretrained(tmp_path)
    vision = VisionWeights(M3Vision(VisionConfig.from_hf(model.config)), default_loader=print)
    names = []
    for header in read_checkpoint(tmp_path):
        if header.name.startswith(("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")):
            vision.require_known(header.name, header.shape)
        names.append(header.name)
    if any("block_sparse_moe.gate_proj" in name for name in names):
        with pytest.raises(ValueError, match=r"rename layers\.N\.block_sparse_moe"):
            planned(tmp_path, M3Config.from_hf(model.config.to_dict()))
    else:
        planned(tmp_path, M3Config.from_hf(model.config.to_dict()))


def test_other_names_are_refused_with_the_cure(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ValueError, match=r"save_pretrained\(FOLDER, save_original_format=True\)"):
        planned(tmp_path, M3Config.from_hf(model.config.to_dict()))
