"""The quantisation methods that we register in vLLM, for M3 and nothing else.

vLLM asks every registered method whether it takes a checkpoint over from the one its config names,
custom methods first. The classes are light, so that other models do not pay for vLLM's layers.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

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


class OwnMethod(QuantizationConfig):
    """A method that takes over every M3 that is ours to serve.

    vLLM sends an object of it to the processes of other ranks, which find the class by its name.

    Attributes
    ----------
    method : the name under which it is registered
    architectures : it takes over
    """

    method: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def register(cls, architectures: tuple[str, ...]) -> None:
        """Register the method for checkpoints of these architectures."""
        cls.architectures = architectures
        register_quantization_config(cls.method)(cls)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Our method for an M3 that is ours to serve, and for this method."""
        found = getattr(hf_config, "architectures", None) or [None]
        ours = found[0] in cls.architectures and cls.takes(hf_quant_cfg)
        return cls.method if ours and why_left_alone(hf_config) is None else None

    @classmethod
    def takes(cls, stored: dict[str, Any]) -> bool:
        """Whether weights that are stored so are for this method."""
        return True

    def get_name(self) -> Any:
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


class PlainWeights(OwnMethod):
    """`M3_PLUGIN_DEQUANTIZE=1`: every layer plain, whatever the checkpoint's method is.

    Our loader does the rest.
    """

    method = "m3_dequantized"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class StoredWeights(OwnMethod):
    """On a CPU: weights stay in the bytes they are stored in, each layer by its own format.

    vLLM has no CPU kernels for most of the formats. Ours (`m3_kernels.quantised_linear`,
    `quantised_experts`) decode within the product; our loader brings every format into one layout.

    Parameters
    ----------
    quantization : what the checkpoint says
    """

    method = "m3_stored"

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    @classmethod
    def takes(cls, stored: dict[str, Any]) -> bool:
        """On a CPU, for which our kernels are."""
        return device_type() == "cpu"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        quantization = read_quantization(config)
        assert quantization is not None
        return cls(quantization)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from m3_vllm.stored_layers import stored_method

        return stored_method(self.quantization, layer, prefix)
