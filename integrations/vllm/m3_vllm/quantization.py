"""`M3_PLUGIN_DEQUANTIZE=1` in vLLM: plain layers for a quantised M3, whatever its method is.

vLLM asks every registered method whether it takes a checkpoint over from the one its config names,
custom methods first. Ours takes over M3 and nothing else; our loader does the rest.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from m3_vllm.registry import why_left_alone

METHOD = "m3_dequantized"


def register_plain_weights(architectures: tuple[str, ...]) -> None:
    """Register the method for checkpoints of these architectures."""
    PlainWeights.architectures = architectures
    register_quantization_config(METHOD)(PlainWeights)


class PlainWeights(QuantizationConfig):
    """Every layer unquantised.

    vLLM sends an object of it to the processes of other ranks, which find the class by its name.
    """

    architectures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Our method for an M3 that is ours to serve."""
        found = getattr(hf_config, "architectures", None) or [None]
        ours = found[0] in cls.architectures and why_left_alone(hf_config) is None
        return METHOD if ours else None

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PlainWeights:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
