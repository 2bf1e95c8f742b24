"""Quantised M3 checkpoints in vLLM on a CPU: weights stay in the bytes they are stored in.

vLLM has no CPU kernels for most of the formats. Ours (`m3_kernels.quantised_linear`,
`quantised_experts`) decode within the product; our loader brings every format into one layout.

The class that vLLM registers is light, so that other models do not pay for vLLM's layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from m3_plugin.quantization.dialects import Quantization, read_quantization
from m3_vllm.compat import device_type
from m3_vllm.registry import why_left_alone

METHOD = "m3_stored"


def register_stored_weights(architectures: tuple[str, ...]) -> None:
    """Register the method for checkpoints of these architectures."""
    StoredWeights.architectures = architectures
    register_quantization_config(METHOD)(StoredWeights)


class StoredWeights(QuantizationConfig):
    """Each layer by the format of its weights, or plain.

    Parameters
    ----------
    quantization : what the checkpoint says
    """

    architectures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Our method for an M3 that is ours to serve, on a CPU."""
        found = getattr(hf_config, "architectures", None) or [None]
        ours = found[0] in cls.architectures and why_left_alone(hf_config) is None
        return METHOD if ours and device_type() == "cpu" else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StoredWeights:
        quantization = read_quantization(config)
        assert quantization is not None
        return cls(quantization)

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

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from m3_vllm.stored_layers import stored_method

        return stored_method(self.quantization, layer, prefix)
