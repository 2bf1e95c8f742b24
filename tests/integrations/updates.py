"""Checkpoints to update a served one with."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

ATTENTION = "language_model.model.layers.2.self_attn."
# all that a host fuses into the projections of one MSA layer
FUSED = [f"{ATTENTION}{p}_proj.weight" for p in ("q", "k", "v", "index_q", "index_k")]
EXPERT = "language_model.model.layers.2.block_sparse_moe.experts.1.w2.weight"
# beyond the budget of the checkpoint `engine`
PROMPT = [(7 * i * i + 3 * i) % 251 + 1 for i in range(700)]


def with_nan(source: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint of whose tensor the last number is none."""
    shutil.copytree(source, target)
    for shard in target.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[-1] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
    return target


def without_tensor(source: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint that lacks one tensor and its index."""
    shutil.copytree(source, target)
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    for shard in target.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            if name not in set(file.keys()):
                continue
        tensors = load_file(shard)
        del tensors[name]
        save_file(tensors, shard, metadata={"format": "pt"})
    return target
