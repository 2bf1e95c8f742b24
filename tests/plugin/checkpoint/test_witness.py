"""Experts as the checkpoint has them, whatever it stores them as, for a proof of the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m3_plugin.checkpoint.names import TEXT_PREFIX
from m3_plugin.checkpoint.witness import ExpertWitness
from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import KnownExperts
from m3_plugin.testing.quantised import quantise_checkpoint, reference_checkpoint
from m3_plugin.testing.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("m3") / "small", preset="small")


def seen(folder: Path, *, size: int = 1) -> tuple[M3Config, list[KnownExperts]]:
    """What the witnesses of all ranks say of the first MoE layer of a checkpoint."""
    config = M3Config.from_hf(json.loads((folder / "config.json").read_text()))
    layer = config.moe_layers.index(True)
    experts = f"model.layers.{layer}.block_sparse_moe.experts"
    witnesses = [
        ExpertWitness(config, experts=experts, rank=rank, size=size) for rank in range(size)
    ]
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            for witness in witnesses:
                witness.see(name.removeprefix(TEXT_PREFIX), tensor)
    found = [witness.testimony() for witness in witnesses]
    return config, [each for each in found if each is not None]


@pytest.mark.parametrize(("quant", "bits"), [("mxfp8", 8), ("nvfp4", 4)])
def test_quantised_experts_are_read_by_value(
    source: Path, tmp_path: Path, quant: Any, bits: int
) -> None:
    _, (stored,) = seen(quantise_checkpoint(source, tmp_path / "stored", quant))
    _, (plain,) = seen(reference_checkpoint(source, tmp_path / "plain", quant))
    assert (stored.bits, plain.bits) == (bits, 16)
    torch.testing.assert_close(stored.w13, plain.w13)
    torch.testing.assert_close(stored.w2, plain.w2)


def test_the_parts_of_ranks_add_up(source: Path) -> None:
    config, (whole,) = seen(source)
    _, parts = seen(source, size=2)
    tokens = whole.tokens(config, dtype=torch.float32)
    total = torch.stack([part.answer(tokens, config) for part in parts]).sum(0)
    torch.testing.assert_close(total, whole.answer(tokens, config), rtol=1e-4, atol=1e-4)


def test_without_all_tensors_nothing_is_said(source: Path) -> None:
    config = M3Config.from_hf(json.loads((source / "config.json").read_text()))
    witness = ExpertWitness(config, experts="model.layers.1.experts", rank=0, size=1)
    assert witness.testimony() is None
