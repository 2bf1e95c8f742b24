"""Quantised checkpoints shared by the engine tests of all hosts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from m3_plugin.testing.quantised import QuantName, quantise_checkpoint, reference_checkpoint

DEQUANTISE = {"M3_PLUGIN_DEQUANTIZE": "1"}

# One scale of a dense layer as ModelOpt names them, one per KV head of an MSA layer as
# compressed-tensors does; the other layers have none.
CACHE_SCALES = {
    "language_model.model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5),
    "language_model.model.layers.0.self_attn.v_proj.v_scale": torch.tensor(0.25),
    "language_model.model.layers.1.self_attn.k_scale": torch.tensor([0.5, 1.5, 3.0, 0.25]).view(
        4, 1, 1
    ),
    "language_model.model.layers.1.self_attn.v_scale": torch.tensor([2.0, 0.75, 1.0, 4.0]).view(
        4, 1, 1
    ),
}


DROPPED_SCALE = "language_model.model.layers.2.self_attn.index_q_proj.weight_scale_inv"


class QuantisedCheckpoints:
    """Writes each checkpoint once: `stored` as published, `reference` as the same numbers plain."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.folder = folder

    def stored(self, quant: QuantName) -> Path:
        return self._once(quantise_checkpoint, quant, f"{quant}-stored")

    def reference(self, quant: QuantName) -> Path:
        return self._once(reference_checkpoint, quant, f"{quant}-reference")

    def with_drafts_kept(self, quant: QuantName) -> Path:
        """`stored` with MTP modules left unquantised."""
        write = partial(quantise_checkpoint, keep_drafts=True)
        return self._once(write, quant, f"{quant}-drafts-kept")

    def with_cache_scales(self, quant: QuantName) -> Path:
        """`stored` with the scales of `CACHE_SCALES` for an fp8 cache in one more file."""
        return self._once(self._add_cache_scales, quant, f"{quant}-cache-scales")

    def _add_cache_scales(self, source: Path, target: Path, quant: QuantName) -> Path:
        shutil.copytree(self.stored(quant), target)
        save_file(CACHE_SCALES, target / "scales.safetensors", metadata={"format": "pt"})
        index = target / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(CACHE_SCALES, "scales.safetensors")
        index.write_text(json.dumps(content))
        return target

    def without_a_scale(self, quant: QuantName) -> Path:
        """`stored` without the scale of one index projection."""
        return self._once(self._drop_scale, quant, f"{quant}-broken")

    def _drop_scale(self, source: Path, target: Path, quant: QuantName) -> Path:
        shutil.copytree(self.stored(quant), target)
        index = json.loads((target / "model.safetensors.index.json").read_text())
        file = target / index["weight_map"][DROPPED_SCALE]
        tensors = load_file(file)
        del tensors[DROPPED_SCALE]
        save_file(tensors, file, metadata={"format": "pt"})
        return target

    def _once(self, write: Callable[..., Path], quant: QuantName, name: str) -> Path:
        target = self.folder / name
        return target if target.exists() else write(self.source, target, quant)
