"""Checkpoints to update a served one with, and the routes of a server that take them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m3_plugin.host.serving import ServerProcess
from m3_plugin.testing.quantised import QuantName
from tests.integrations.quantised import DEQUANTISE, QuantisedCheckpoints

ATTENTION = "language_model.model.layers.2.self_attn."
# all that a host fuses into the projections of one MSA layer
FUSED = [f"{ATTENTION}{p}_proj.weight" for p in ("q", "k", "v", "index_q", "index_k")]
EXPERT = "language_model.model.layers.2.block_sparse_moe.experts.1.w2.weight"
# beyond the budget of the checkpoint `engine`
PROMPT = [(7 * i * i + 3 * i) % 251 + 1 for i in range(700)]

# Formats that an update keeps, and what a server of them is started with.
QUANTISED = (
    pytest.param("nvfp4", DEQUANTISE, id="nvfp4 dequantised"),
    pytest.param("nvfp4", {}, id="nvfp4 as stored"),
    pytest.param("mxfp8", {}, id="mxfp8 as stored"),
)


@dataclass(frozen=True)
class ServedCheckpoint:
    """A server whose weights change.

    Attributes
    ----------
    original : the checkpoint it was started with
    """

    server: ServerProcess
    original: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Ask one of the host's own routes, past proxies."""
        return httpx.post(f"{self.server.url}/{path}", json=body, timeout=600, trust_env=False)


@dataclass(frozen=True)
class QuantisedPair:
    """Two checkpoints of one format, of other numbers under the same names.

    Attributes
    ----------
    part : names of the tensors that one expert's matrix is stored as
    """

    original: Path
    other: Path
    part: list[str]

    @classmethod
    def of(
        cls,
        plain: Path,
        other: Path,
        folder: Path,
        quant: QuantName,
        *,
        names: Callable[[str], Iterable[str]],
    ) -> QuantisedPair:
        """Store two plain checkpoints below a folder; `names` tells a checkpoint's tensors."""
        stored = [
            QuantisedCheckpoints(source, folder / name).stored(quant)
            for name, source in (("original", plain), ("other", other))
        ]
        expert = EXPERT.removesuffix("weight")
        part = [name for name in names(str(stored[1])) if name.startswith(expert)]
        assert len(part) > 1
        return cls(stored[0], stored[1], part)


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
