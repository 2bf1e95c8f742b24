"""What the quantisation methods that we register in SGLang have in common."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from m3_plugin.quantization.dialects import Quantization, read_quantization
from m3_sglang.compat import stored_quantization


class CheckpointConfig(QuantizationConfig):
    """SGLang's view of a quantised checkpoint, by our own reading of its config.json.

    Parameters
    ----------
    quantization : what config.json says

    Attributes
    ----------
    name : under which the method is registered
    min_capability : of a GPU, 90 for SM90
    """

    name: ClassVar[str]
    min_capability: ClassVar[int] = 0

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def get_name(self) -> str:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return cls.min_capability

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        quantization = read_quantization(stored_quantization(config))
        assert quantization is not None
        return cls(quantization)

    def get_scaled_act_names(self) -> list[str]:
        return []
