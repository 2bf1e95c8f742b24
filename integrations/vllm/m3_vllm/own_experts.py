"""MiniMax-M3.1 in vLLM: MXFP8 layers and NVFP4 experts under one method, both weight-only.

vLLM reads such a checkpoint as MXFP8 throughout and has methods for both formats; here each layer
gets the one its weights are stored for. Activations of experts stay in 16 bits: what M3.1 stores of
the scale of activations of `w1` and `w3` is not described, and vLLM's products of FP4 would use it.
Below SM100 Marlin multiplies all of it, where vLLM would take Humming on SM90 and, for projections,
quantise activations; `--moe-backend` and `--linear-backend` are obeyed.

The class that vLLM registers is light, so that other models do not pay for vLLM's quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from m3_plugin.quantization.chips import WEIGHT_ONLY_NVFP4
from m3_plugin.quantization.dialects import PLAIN, Quantization, read_quantization
from m3_vllm.compat import device_major
from m3_vllm.quantization import OwnMethod

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config


class OwnExperts(OwnMethod):
    """Each layer's method, from vLLM's own for MXFP8 and for NVFP4.

    Parameters
    ----------
    quantization : what the checkpoint says; vLLM finds a listed "gate" in "gate_up_proj", too
    dense : vLLM's config of a checkpoint that is MXFP8 throughout
    """

    method = "m3_mxfp8_nvfp4"

    def __init__(self, quantization: Quantization, dense: ModelOptMxFp8Config) -> None:
        super().__init__()
        self.quantization = quantization
        self.dense = dense

    @classmethod
    def takes(cls, stored: dict[str, Any]) -> bool:
        """M3.1 alone."""
        if stored.get("moe_quant_algo") is None:
            return False
        quantization = read_quantization(stored)
        return quantization is not None and quantization.has_own_experts

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Ours for which layer is stored how, vLLM's for those in MXFP8."""
        from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config

        quantization = read_quantization(config)
        assert quantization is not None
        # what it says of a cache is of training; without it scales need not be in the checkpoint
        return cls(quantization, ModelOptMxFp8Config.from_config({"ignored_layers": []}))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return self.dense.get_supported_act_dtypes()

    @classmethod
    def get_min_capability(cls) -> int:
        return WEIGHT_ONLY_NVFP4

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from m3_plugin.checkpoint.stored_layers import format_of_layer
        from m3_vllm.weights import FUSED_EITHER_WAY

        if isinstance(layer, RoutedExperts):
            return weight_only_experts(layer, prefix)
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            if format_of_layer(self.quantization, prefix, fused=FUSED_EITHER_WAY) == PLAIN:
                return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
            prefer_marlin()
        return self.dense.get_quant_method(layer, prefix)


def prefer_marlin() -> None:
    """Have vLLM choose Marlin for MXFP8 below SM100, unless a backend was asked for."""
    from vllm.config import get_current_vllm_config_or_none

    config, major = get_current_vllm_config_or_none(), device_major()
    if config is None or major is None or major >= 10:
        return
    kernels: Any = config.kernel_config
    if kernels.linear_backend == "auto":
        asked = kernels.linear_backend_per_quant or {}
        kernels.linear_backend_per_quant = {"mxfp8": "marlin"} | asked


def weight_only_experts(layer: Any, prefix: str) -> QuantizeMethodBase:
    """vLLM's method for NVFP4 experts of compressed-tensors, with activations in 16 bits."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as hosts,
    )

    if layer.moe_config.moe_backend == "auto":
        layer.moe_config.moe_backend = "marlin"
    return hosts.CompressedTensorsW4A4Nvfp4MoEMethod(layer.moe_config, prefix, use_a16=True)
