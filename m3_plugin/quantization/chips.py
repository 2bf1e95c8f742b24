"""Which chip runs stored weights how: what `m3-plugin fit` says, computed and not measured.

A host's own method for a format declares the compute capability it asks for; tests compare the
table with the classes of the installed hosts. A method's kernels may still refuse a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from m3_plugin.quantization.dialects import PLAIN, Quantization

# Host -> quant_method -> compute capability as major * 10 + minor.
LEAST_CAPABILITY: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "vLLM": {
            "mxfp8": 80,
            "modelopt": 75,
            "quark": 70,
            "compressed-tensors": 70,
            "gptq": 60,
            "auto-round": 60,
            "fp8": 75,
        },
        "SGLang": {
            "mxfp8": 100,
            "modelopt": 80,
            "quark": 70,
            "compressed-tensors": 70,
            "gptq": 80,
            "auto-round": 60,
            "fp8": 80,
        },
    }
)
# NVFP4 experts beside MXFP8 (M3.1), with activations in 16 bits: Marlin, in both hosts.
WEIGHT_ONLY_NVFP4 = 80
# Below SGLang's own: this plugin's method, on a GPU of this capability.
WEIGHT_ONLY_MXFP8 = 80
LEFT_TO_SGLANG = "as stored, by SGLang's own model, to which this plugin leaves it"
ON_CPU = "as stored, by this plugin's CPU kernels"
DEQUANTISED = "16 bits with M3_PLUGIN_DEQUANTIZE=1"


def how_weights_run(quantization: Quantization | None, *, arch: int | None) -> dict[str, str]:
    """Host -> how it holds the checkpoint's weights on a chip.

    Parameters
    ----------
    quantization : of the checkpoint, None for plain weights
    arch : compute capability as major * 10 + minor; None for a CPU
    """
    if quantization is None:
        return dict.fromkeys(LEAST_CAPABILITY, "as stored")
    if arch is None:
        return dict.fromkeys(
            LEAST_CAPABILITY, ON_CPU if _has_layouts(quantization) else DEQUANTISED
        )
    if quantization.has_own_experts:
        return _how_own_experts_run(arch)
    method = quantization.method
    found = {}
    for host, least in LEAST_CAPABILITY.items():
        if arch >= least[method]:
            found[host] = f"as stored, by its own {method} method (asks for SM{least[method]})"
        elif host == "SGLang" and method == "mxfp8" and arch >= WEIGHT_ONLY_MXFP8:
            found[host] = "as stored, by this plugin's weight-only method"
        else:
            found[host] = DEQUANTISED
    return found


def _has_layouts(quantization: Quantization) -> bool:
    """Whether our CPU kernels read what projections and experts are stored as."""
    # brings torch, which nothing else here needs
    from m3_plugin.quantization.packing import layout_of

    layer = "model.layers.3"
    modules = (f"{layer}.self_attn.q_proj", f"{layer}.block_sparse_moe.experts.0.w1")
    formats = [quantization.format_of(module) for module in modules]
    return all(weight == PLAIN or layout_of(weight) is not None for weight in formats)


def _how_own_experts_run(arch: int) -> dict[str, str]:
    """`how_weights_run` for MXFP8 beside NVFP4 experts (M3.1), on a GPU."""
    if arch < WEIGHT_ONLY_NVFP4:
        return dict.fromkeys(LEAST_CAPABILITY, DEQUANTISED)
    marlin = "as stored, experts on Marlin with activations in 16 bits"
    return {"vLLM": marlin, "SGLang": LEFT_TO_SGLANG if arch // 10 == 10 else marlin}
