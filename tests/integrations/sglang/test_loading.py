"""A checkpoint with a tensor missing does not start, whatever fused parameter it belongs to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.sglang.engine import EngineDiedError, EngineProcess

MISSING = "language_model.model.layers.2.self_attn.index_k_proj.weight"


@pytest.mark.extended
def test_a_missing_part_of_a_fused_parameter_is_named(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint("engine"), checkpoint)
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop(MISSING, None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(EngineDiedError, match=r"missing 1 tensor\(s\): model\.layers\.2.*index_k"):
        EngineProcess(checkpoint, log=tmp_path / "engine.log")
