"""MiniMax-M3.1 in vLLM: MXFP8 layers and NVFP4 experts under one method, both weight-only.

vLLM reads such a checkpoint as MXFP8 throughout and has methods for both formats; here each layer
gets the one its weights are stored for. Activations stay in 16 bits: what M3.1 stores of the scale
of activations of `w1` and `w3` is not described, and vLLM's products of FP4 would use it.

The class that vLLM registers is light, so that other models do not pay for vLLM's quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from m3_plugin.quantization.chips import WEIGHT_ONLY_NVFP4
from m3_plugin.quantization.dialects import read_quantization
from m3_vllm.quantization import OwnMethod

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config


class OwnExperts(OwnMethod):
    """Each layer's method, from vLLM's own for MXFP8 and for NVFP4.

    Parameters
    ----------
    dense : vLLM's config of an MXFP8 checkpoint, for everything but routed experts
    """

    method = "m3_mxfp8_nvfp4"

    def __init__(self, dense: ModelOptMxFp8Config) -> None:
        super().__init__()
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
        """vLLM's config for the dense layers, with the list under either of its two names."""
        from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config

        kept = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
        # what it says of a cache is of training; without it scales need not be in the checkpoint
        return cls(ModelOptMxFp8Config.from_config({"ignored_layers": list(kept)}))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return self.dense.get_supported_act_dtypes()

    @classmethod
    def get_min_capability(cls) -> int:
        return WEIGHT_ONLY_NVFP4

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        if isinstance(layer, RoutedExperts):
            return weight_only_experts(layer, prefix)
        self.dense.packed_modules_mapping = self.packed_modules_mapping
        return self.dense.get_quant_method(layer, prefix)


def weight_only_experts(layer: Any, prefix: str) -> QuantizeMethodBase:
    """vLLM's method for NVFP4 experts of compressed-tensors, with activations in 16 bits."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as hosts,
    )

    return hosts.CompressedTensorsW4A4Nvfp4MoEMethod(layer.moe_config, prefix, use_a16=True)
