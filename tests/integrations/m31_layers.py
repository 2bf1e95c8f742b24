"""M3.1's stored tensors beside what a host's own layers and decoders make of them, bit for bit.

Used in the process of a host's `host_layers_m31`, which has its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from m3_plugin.checkpoint.names import TEXT_PREFIX
from m3_plugin.quantization.codecs import dequantise
from m3_plugin.quantization.formats import Mxfp8, Nvfp4

NVFP4 = Nvfp4("weight_packed", "weight_global_scale", "input_global_scale", divides=True)
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
MATRICES = {"w13": ("w1", "w3"), "w2": ("w2",)}
# Of a number that is divided by another, or multiplied by the other's inverse, in fp32.
TWO_ROUNDINGS = 2.0**-22


def experts_as_stored(model: nn.Module, files: Mapping[str, Tensor]) -> dict[str, bool]:
    """Per layer and part of its experts: whether the host holds the files' bytes.

    Parameters
    ----------
    model : the text model; names of its experts' parameters are those of compressed-tensors
    files : every tensor of the checkpoint
    """
    report = {}
    for name, module in model.named_modules():
        own = {n: p.data for n, p in module.named_parameters(recurse=False)}
        layer = f"{name.partition('.experts')[0]}.experts"
        for prefix, matrices in MATRICES.items():
            for suffix in SUFFIXES:
                if f"{prefix}_{suffix}" not in own:
                    continue
                stored = [
                    torch.cat([files[f"{TEXT_PREFIX}{layer}.{e}.{m}.{suffix}"] for m in matrices])
                    for e in range(len(own["w2_weight_packed"]))
                ]
                held = own[f"{prefix}_{suffix}"].reshape(len(stored), *stored[0].shape)
                report[f"{layer}.{prefix}_{suffix}"] = torch.equal(
                    held.view(torch.uint8), torch.stack(stored).view(torch.uint8)
                )
    return report


def decoded_alike(
    files: Mapping[str, Tensor],
    *,
    mxfp8: Callable[[Tensor, Tensor], Tensor],
    nvfp4: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> dict[str, int]:
    """How many matrices a host's decoders read as ours do; the first that they do not is an error.

    Up to the scale of the whole tensor bit for bit; this plugin divides by it, and hosts multiply
    by its inverse.

    Parameters
    ----------
    files : every tensor of the checkpoint
    mxfp8 : values, exponents -> bf16 [rows, columns]
    nvfp4 : packed codes, scales, factor of the tensor -> fp32 [rows, columns]
    """
    counted = {"mxfp8": 0, "nvfp4": 0}
    for name, tensor in files.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_scale_inv":
            parts = {"weight": files[f"{module}.weight"], suffix: tensor}
            ours = dequantise(Mxfp8(), parts).bfloat16()
            _require_bits(mxfp8(parts["weight"], tensor), ours, name=module)
            counted["mxfp8"] += 1
        elif suffix == NVFP4.weight:
            scales, whole = files[f"{module}.weight_scale"], files[f"{module}.weight_global_scale"]
            parts = {suffix: tensor, "weight_scale": scales, NVFP4.global_scale: torch.ones(1)}
            _require_bits(
                nvfp4(tensor, scales, torch.ones(1)), dequantise(NVFP4, parts), name=module
            )
            ours = dequantise(NVFP4, parts | {NVFP4.global_scale: whole})
            theirs = nvfp4(tensor, scales, 1 / whole)
            torch.testing.assert_close(theirs, ours, rtol=TWO_ROUNDINGS, atol=0, msg=module)
            counted["nvfp4"] += 1
    return counted


def _require_bits(theirs: Tensor, ours: Tensor, *, name: str) -> None:
    assert theirs.dtype == ours.dtype
    assert torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)), name
