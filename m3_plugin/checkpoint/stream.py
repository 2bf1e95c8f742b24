"""Quantised tensors in, plain weights out, while a host loads: works with any chip and host.

A host hands over tensor after tensor in an order of its own. The tensors of one weight wait for
each other here and leave as one plain `weight`, so the host needs no idea of the checkpoint's
format. Memory: the plain weights, plus the parts of the few weights that are not complete yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3_plugin.checkpoint.names import linear_shape
from m3_plugin.model.config import M3Config
from m3_plugin.quantization.codecs import dequantise
from m3_plugin.quantization.dialects import PLAIN
from m3_plugin.quantization.formats import (
    WeightFormat,
    require_all_parts,
    require_part,
    required_suffixes,
)

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Dequantiser:
    """Collects the parts of each quantised weight and gives the weight out once they are there.

    Parameters
    ----------
    config : what the checkpoint says about itself
    """

    def __init__(self, config: M3Config) -> None:
        self.config = config
        self.waiting: dict[str, dict[str, Tensor]] = {}

    def take(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Take a stored tensor; the plain fp32 weight if that was all it still lacked.

        Parameters
        ----------
        name : relative to the text model
        tensor : as stored

        Raises
        ------
        ValueError : not a part of its weight's format, or of a wrong shape or dtype.
        """
        module, _, suffix = name.rpartition(".")
        weight = self._format_of(module)
        if weight == PLAIN:
            return name, tensor
        parts = weight.parts(*linear_shape(self.config, module))
        dtype, shape = SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape)
        require_part(weight, parts, tensor=name, dtype=dtype, shape=shape)
        if not parts[suffix].required:
            return None
        arrived = self.waiting.setdefault(module, {})
        arrived[suffix] = tensor
        if arrived.keys() != required_suffixes(parts):
            return None
        return f"{module}.weight", dequantise(weight, self.waiting.pop(module))

    def require_complete(self) -> None:
        """Refuse weights of which a part never came.

        Raises
        ------
        ValueError : names the missing tensors of the first such weight.
        """
        for module, arrived in self.waiting.items():
            weight = self._format_of(module)
            parts = weight.parts(*linear_shape(self.config, module))
            require_all_parts(weight, parts, module=module, found=arrived)

    def _format_of(self, module: str) -> WeightFormat:
        quantization = self.config.quantization
        return PLAIN if quantization is None else quantization.format_of(module)
