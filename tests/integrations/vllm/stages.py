"""Weights of pipeline stages and of expert parallel ranks, tensor by tensor, on the meta device.

Used by `building.py`, in its process. Our loader accounts for the names, vLLM's layers take their
parts, and vLLM's own loader says which experts its filter leaves in the files. No number is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3_plugin.checkpoint.names import tensor_shape, text_modules
from tests.integrations.counted import shortened
from tests.integrations.vllm.building import build, rank, resolved
from tests.integrations.vllm.drafting import LAYERS

FILTERED = "--enable-expert-parallel --enable-ep-weight-filter"
# tensor parallel ranks, pipeline stages, what else is typed, (stage, rank of it) that are loaded
LOADS = (
    (4, 2, "", ((0, 0), (1, 3))),
    (4, 1, "--enable-expert-parallel", ((0, 1),)),
    (4, 1, FILTERED, ((0, 0), (0, 3))),
)
# of the first and of the second stage
DROPPED = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.7.self_attn.index_k_proj.weight",
)
UNKNOWN = "model.layers.8.self_attn.q_proj.weight"


def tensors(config: Any) -> dict[str, Tensor]:
    """Every tensor of the text model's checkpoint."""
    return {
        module if module.endswith("_bias") else f"{module}.weight": torch.empty(
            tensor_shape(config, module), dtype=torch.bfloat16, device="meta"
        )
        for module in sorted(text_modules(config))
    }


def read_by_host(vllm_config: Any, files: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What vLLM's loader hands to this rank."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    loader = DefaultModelLoader(vllm_config.load_config)
    loader._init_ep_weight_filter(vllm_config.model_config)
    skipped = loader.local_expert_ids
    return {name: t for name, t in files.items() if not should_skip_weight(name, skipped)}


def placed_otherwise(files: Mapping[str, Tensor], *, experts: int) -> dict[str, Tensor]:
    """What a filter would read that thinks of experts dealt out one by one."""
    from vllm.model_executor.model_loader.ep_weight_filter import (
        compute_local_expert_ids,
        should_skip_weight,
    )

    dealt = compute_local_expert_ids(experts, 4, 1, placement="round_robin")
    return {name: t for name, t in files.items() if not should_skip_weight(name, dealt)}


def load(model: Any, given: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that were filled."""
    loader = model.language_model.weight_loader()
    for name, tensor in given.items():
        loader.load(name, tensor)
    return loader.finish()


def refused(model: Any, given: Mapping[str, Tensor]) -> str:
    """What the loader says of other tensors."""
    try:
        load(model, given)
    except ValueError as error:
        return str(error)
    return ""


def report(vllm_config: Any) -> dict[str, Any]:
    """What became of a rank's weights, and what would be said of broken checkpoints."""
    model = build(vllm_config)
    text = model.language_model
    files = tensors(text.model.m3_config)
    given = read_by_host(vllm_config, files)
    parameters = {name for name, _ in text.named_parameters()}
    experts = next(m for m in text.modules() if type(m).__name__ == "RoutedExperts")
    return {
        "tensors": len(files),
        "read": len(given),
        "empty": sorted(parameters - load(model, given)),
        "experts": [experts.local_num_experts, experts.global_num_experts],
        "missing": [
            refused(model, {n: t for n, t in given.items() if n != name}) for name in DROPPED
        ],
        "left_over": refused(model, {**given, UNKNOWN: given[DROPPED[0]]}),
        "placed_otherwise": refused(
            model, placed_otherwise(files, experts=experts.global_num_experts)
        ),
    }


def loads(folder: str) -> dict[str, Any]:
    """Server, stage and rank -> report; the released model's first layers."""
    short = Path(folder) / "loaded"
    short.mkdir()
    released = json.loads((Path(folder) / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(shortened(released, LAYERS)))
    found: dict[str, Any] = {}
    for tensor, stages, typed, places in LOADS:
        command = f"--tensor-parallel-size {tensor} --pipeline-parallel-size {stages} {typed}"
        for place, beside in places:
            config = resolved(str(short), command)
            config.cache_config.block_size = 128
            with rank(config, place=place, tensor=tensor, stages=stages, beside=beside):
                name = f"tp {tensor}, pp {stages} {typed}".strip()
                found[f"{name}: stage {place}, rank {beside}"] = report(config)
    return found
