"""Load an mxfp8 checkpoint by SGLang's own loader, without an engine, and compare with its files.

    python -m tests.integrations.sglang.host_layers STORED REPORT

A process of its own, because it sets up SGLang's process-wide state.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m3_plugin.checkpoint.names import TEXT_PREFIX

SUFFIXES = ("weight", "weight_scale_inv")


def build(stored: Path) -> Any:
    """Our text model as SGLang's scheduler builds it, weights loaded and processed."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.model_loader import get_model
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    # its fields are made by a decorator that type checkers cannot follow
    given: dict[str, Any] = {"model_path": str(stored), "dtype": "float32", "device": "cpu"}
    arguments = ServerArgs(**given)
    arguments.resolve_once()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{folder}/rendezvous",
            backend="gloo",
        )
        initialize_model_parallel()
    model: Any = get_model(
        model_config=ModelConfig.from_server_args(arguments),
        load_config=LoadConfig(),
        device_config=DeviceConfig("cpu"),
    )
    return model.language_model


def compare(model: nn.Module, files: dict[str, Tensor]) -> dict[str, bool]:
    """Per layer with quantised weights: whether it holds the files' bytes, values and scales."""
    from m3_sglang.weights import FUSED

    parts: dict[str, list[str]] = {}
    for part, (fused, _) in FUSED.items():
        parts.setdefault(fused, []).append(part)
    report = {}
    for name, module in model.named_modules():
        own = {n: p.data for n, p in module.named_parameters(recurse=False)}
        parent, _, last = name.rpartition(".")
        if "weight_scale_inv" in own:
            modules = [f"{parent}.{part}" for part in parts.get(last, [last])]
            report[name] = all(same(own[s], files, modules, s) for s in SUFFIXES)
        for prefix, matrices in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            if f"{prefix}_weight_scale_inv" in own:
                report[f"{name}.{prefix}"] = all(
                    same(own[f"{prefix}_{s}"][e], files, [f"{name}.{e}.{m}" for m in matrices], s)
                    for e in range(len(own[f"{prefix}_weight"]))
                    for s in SUFFIXES
                )
    return report


def sparse_layers(model: nn.Module) -> dict[str, Any]:
    """Our MSA attention modules by name."""
    from m3_sglang.attention import M3SparseAttention

    return {n: m for n, m in model.named_modules() if isinstance(m, M3SparseAttention)}


def same(held: Tensor, files: dict[str, Tensor], modules: list[str], suffix: str) -> bool:
    stored = [files[f"{TEXT_PREFIX}{module}.{suffix}"].view(torch.uint8) for module in modules]
    return torch.equal(held.view(torch.uint8), torch.cat(stored))


def main(stored: str, report: str) -> None:
    model = build(Path(stored))
    files: dict[str, Tensor] = {}
    for file in Path(stored).glob("*.safetensors"):
        files |= load_file(file)
    facts = {
        "layers": compare(model, files),
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "stored": sum(t.nbytes for n, t in files.items() if n.startswith(TEXT_PREFIX)),
        "scales": {
            name: [values.tolist() for values in (module.cache_scales.k, module.cache_scales.v)]
            for name, module in sparse_layers(model).items()
            if module.cache_scales.k is not None
        },
    }
    Path(report).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
