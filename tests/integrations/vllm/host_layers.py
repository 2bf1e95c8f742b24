"""Load a quantised checkpoint into vLLM's own quantised layers and compare them with the reference.

    python -m tests.integrations.vllm.host_layers STORED REFERENCE REPORT

A process of its own, because it sets up vLLM's distributed state and leaves out the choice of
kernels, of which vLLM has none on CPU for these formats. Nothing is computed with the layers.
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

from m3_plugin.checkpoint.names import TEXT_PREFIX, VISION_PREFIXES
from m3_plugin.host.torchvision_ops import declare_missing_ops
from m3_plugin.model.config import M3Config
from m3_plugin.quantization.codecs import dequantise
from m3_plugin.quantization.formats import Mxfp8, Nvfp4, Plain, WeightFormat


def without_kernels() -> None:
    """Let vLLM's methods be built although this machine has no kernel for them."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as compressed,
    )

    class Kernel:
        def input_quant_key(self) -> None:
            return None

    host: Any = modelopt
    host.select_linear_kernel = lambda *args, **kwargs: Kernel()
    host.select_mxfp8_moe_backend = lambda *args, **kwargs: (None, None)
    host.select_nvfp4_moe_backend = lambda *args, **kwargs: (None, None)
    host = compressed
    host.select_nvfp4_moe_backend = lambda *args, **kwargs: (NvFp4MoeBackend.MARLIN, None)


def build(stored: Path, *, own: bool = False) -> tuple[nn.Module, M3Config]:
    """Our model around vLLM's layers, or those of our own for a CPU, with the checkpoint loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.plugins import load_general_plugins

    from m3_vllm import quantization

    load_general_plugins()
    if not own:
        # on a CPU no checkpoint is left to vLLM's own layers
        choosing: Any = quantization
        choosing.device_type = lambda: "cuda"
    config = EngineArgs(model=str(stored), dtype="bfloat16", enforce_eager=True)
    vllm_config = config.create_engine_config()
    with set_current_vllm_config(vllm_config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        if not own:
            without_kernels()
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model: Any = initialize_model(vllm_config=vllm_config)
        torch.set_default_dtype(default)
        tensors = read(stored)
        model.load_weights(iter(tensors.items()))
    return model.language_model, model.language_model.model.m3_config


def read(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def compare(model: nn.Module, config: M3Config, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Per fused layer: its format, and the largest difference of its numbers to the reference."""
    from m3_vllm.weights import fused_projections

    plain = {
        name.removeprefix(TEXT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in reference.items()
        if not name.startswith(VISION_PREFIXES)
    }
    fused = fused_projections(config)
    order: dict[str, list[str]] = {}
    for part in ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"):
        order.setdefault(fused[part][0], []).append(part)
    order["gate_up_proj"] = ["gate_proj", "up_proj"]
    report = {}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        tensors = {n: p.data for n, p in module.named_parameters(recurse=False)}
        candidates = [f"{parent}.{part}".lstrip(".") for part in order.get(own, [own])]
        # dense layers have no index projections
        parts = [part for part in candidates if part in plain]
        if "weight" in tensors and parts:
            expected = torch.cat([plain[part] for part in parts])
            if expected.dim() == 2 and own != "gate":
                weight = format_of(tensors, prefix="")
                found = decode(weight, tensors, prefix="", halves=1)
                report[name] = entry(weight, found, expected)
        if tensors.keys() & {"w13_weight", "w13_weight_packed"}:
            layer = name.partition(".experts")[0] + ".experts"
            report[layer] = compare_experts(layer, tensors, plain, config)
    return report


def cache_scales(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Per attention layer with scales of an fp8 cache: what K and V are multiplied with."""
    from m3_vllm.caches import M3SparseCacheLayer

    report = {}
    for name, module in model.named_modules():
        if isinstance(module, M3SparseCacheLayer):
            pair = {"k_scale": module.scales.k, "v_scale": module.scales.v}
        else:
            own = dict(module.named_parameters(recurse=False))
            pair = {scale: own.get(scale) for scale in ("k_scale", "v_scale")}
        found = {scale: values for scale, values in pair.items() if values is not None}
        # vLLM marks a scale that never came by -1
        if len(found) == 2 and all(bool((values > 0).all()) for values in found.values()):
            report[name] = {scale: values.reshape(-1).tolist() for scale, values in found.items()}
    return report


def compare_experts(
    layer: str, tensors: dict[str, Tensor], plain: dict[str, Tensor], config: M3Config
) -> dict[str, Any]:
    """All routed experts of a layer; the largest difference of any of them."""
    weight = format_of(tensors, prefix="w13_")
    worst = 0.0
    for expert in range(config.num_experts):
        own = {name: tensor[expert] for name, tensor in tensors.items()}
        names = [f"{layer}.{expert}.{part}" for part in ("w1", "w3", "w2")]
        gate_up = torch.cat([plain[names[0]], plain[names[1]]])
        for prefix, halves, expected in (("w13_", 2, gate_up), ("w2_", 1, plain[names[2]])):
            found = decode(weight, own, prefix=prefix, halves=halves)
            worst = max(worst, float((found - expected).abs().max()))
    return {"format": weight.name, "difference": worst}


def format_of(tensors: dict[str, Tensor], *, prefix: str) -> WeightFormat:
    """vLLM's layers name their scales as ModelOpt does, or as compressed-tensors."""
    if f"{prefix}weight_global_scale" in tensors:
        return Nvfp4("weight_packed", "weight_global_scale", "input_global_scale", divides=True)
    if f"{prefix}weight_scale_2" in tensors:
        return Nvfp4()
    return Mxfp8(scale="weight_scale") if f"{prefix}weight_scale" in tensors else Plain()


def decode(weight: WeightFormat, tensors: dict[str, Tensor], *, prefix: str, halves: int) -> Tensor:
    """A layer's numbers; with two halves the scale of the tensor is one per half."""
    parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not isinstance(weight, Nvfp4):
        return dequantise(weight, parts)
    scales = parts[weight.global_scale].reshape(-1)
    assert scales.numel() == halves
    rows = [t.chunk(halves) for t in (parts[weight.weight], parts["weight_scale"])]
    return torch.cat(
        [
            dequantise(weight, {weight.weight: w, "weight_scale": s, weight.global_scale: scale})
            for w, s, scale in zip(*rows, scales, strict=True)
        ]
    )


def entry(weight: WeightFormat, found: Tensor, expected: Tensor) -> dict[str, Any]:
    # plain weights are rounded to the model's dtype, padding rows are cut
    if isinstance(weight, Plain):
        expected = expected.to(torch.bfloat16).float()
    difference = (found[: len(expected)].float() - expected).abs().max()
    return {"format": weight.name, "difference": float(difference)}


def main(stored: str, reference: str, report: str) -> None:
    declare_missing_ops()
    model, config = build(Path(stored))
    compared = compare(model, config, read(Path(reference)))
    Path(report).write_text(json.dumps(compared | cache_scales(model)))


if __name__ == "__main__":
    main(*sys.argv[1:])
