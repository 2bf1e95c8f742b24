"""LoRA adapters for a checkpoint of transformers' reach, and the checkpoint with them merged in.

The merged checkpoint is what transformers is asked about: an adapter served is right if it answers
like weights that hold it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3_plugin.checkpoint.adapters import ADAPTED

RANK = 8
ALPHA = 16
# Of the standard deviation of a weight: large enough that answers change.
SHARE = 0.5
# How adapters are written: names of the module in its file.
PEFT = "base_model.model."

# Modules that no host may pass over in silence, and what the refusal says.
REFUSED = [
    ("language_model.model.layers.1.block_sparse_moe.experts.0.w1", "experts.0.w1.*merge"),
    ("language_model.model.layers.1.block_sparse_moe.gate", "are taken by projections"),
    ("language_model.model.layers.99.self_attn.q_proj", "layers 0 to"),
    ("language_model.model.layers.0.self_attn.index_q_proj", "of layer 0"),
    ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "are taken by"),
    ("language_model.lm_head", "are taken by"),
]


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and the checkpoint with it merged in."""

    folder: Path
    merged: Path


def two_adapters(checkpoint: Path, root: Path) -> list[Adapter]:
    """One of every projection, one of the index branch alone."""
    made = []
    for seed, modules in enumerate((ADAPTED, ("index_q_proj", "index_k_proj"))):
        pairs = draw(checkpoint, modules, seed=seed)
        assert {name.rpartition(".")[2] for name in pairs} == set(modules)
        made.append(
            Adapter(
                write_adapter(root / f"adapter-{seed}", pairs),
                merge(checkpoint, pairs, root / f"merged-{seed}"),
            )
        )
    return made


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def draw(
    checkpoint: Path, modules: Iterable[str], *, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B for modules of the checkpoint, by the checkpoint's names without ".weight".

    Parameters
    ----------
    modules : ends of names; each module that ends so gets a pair
    """
    generator = torch.Generator().manual_seed(seed)
    ends = tuple(f".{module}.weight" for module in modules)
    pairs = {}
    for name, weight in sorted(read_weights(checkpoint).items()):
        if name.endswith(ends) and name.startswith("language_model."):
            a = torch.randn(RANK, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], RANK, generator=generator)
            # the entries of B A have a deviation of sqrt(RANK)
            b *= SHARE * weight.float().std() / RANK**0.5 / (ALPHA / RANK)
            pairs[name.removesuffix(".weight")] = (a, b)
    return pairs


def write_adapter(
    folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], *, extra: Mapping[str, Tensor] = {}
) -> Path:
    """An adapter in the form in which PEFT saves it.

    Parameters
    ----------
    pairs : A and B by module, as the adapter is to call it
    extra : more tensors, by their whole names
    """
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "MiniMaxAI/MiniMax-M3",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = dict(extra)
    for module, (a, b) in pairs.items():
        tensors[f"{PEFT}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PEFT}{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_cut_adapter(checkpoint: Path, folder: Path, *, half: int) -> Path:
    """An adapter of output projections in which one half of each pair lacks its last column."""
    cut = {}
    for module, pair in draw(checkpoint, ["o_proj"], seed=7).items():
        a, b = (part[:, :-1] if i == half else part for i, part in enumerate(pair))
        cut[module] = (a, b)
    return write_adapter(folder, cut)


def merge(checkpoint: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    """The checkpoint with an adapter in its weights; `pairs` by the checkpoint's names."""
    shutil.copytree(checkpoint, folder)
    left = dict(pairs)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for module in [m for m in left if f"{m}.weight" in tensors]:
            a, b = left.pop(module)
            weight = tensors[f"{module}.weight"]
            merged = weight.double() + ALPHA / RANK * (b.double() @ a.double())
            tensors[f"{module}.weight"] = merged.to(weight.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    assert not left, f"the checkpoint lacks {sorted(left)}"
    return folder
