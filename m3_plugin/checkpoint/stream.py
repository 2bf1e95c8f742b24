"""Quantised tensors in, weights of one form out, while a host loads: no host knows the formats.

A host hands over tensor after tensor in an order of its own. The tensors of one weight wait for
each other here and leave as one plain `weight` (`Dequantiser`: any chip and host), or as codes and
scales in the one layout of our CPU kernels (`Packer`). Memory: what leaves, plus the parts of the
few weights that are not complete yet.
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
from m3_plugin.quantization.packing import pack

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


class Rewriter:
    """Collects the parts of each quantised weight, until a subclass can make something of them.

    Parameters
    ----------
    config : what the checkpoint says about itself
    """

    def __init__(self, config: M3Config) -> None:
        self.config = config
        self.waiting: dict[str, dict[str, Tensor]] = {}

    def rewrite(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Take a stored tensor; the weight's new tensors if that was all it still lacked.

        Parameters
        ----------
        name : relative to the text model
        tensor : as stored

        Raises
        ------
        ValueError : not a part of its weight's format, or of a wrong shape or dtype; no numbers.
        """
        raise NotImplementedError

    def _collect(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Parts of the weight if this was the last of them."""
        module, _, suffix = name.rpartition(".")
        weight = self._format_of(module)
        parts = weight.parts(*linear_shape(self.config, module))
        dtype, shape = SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape)
        require_part(weight, parts, tensor=name, dtype=dtype, shape=shape)
        if not parts[suffix].required:
            return None
        arrived = self.waiting.setdefault(module, {})
        arrived[suffix] = tensor
        return self.waiting.pop(module) if arrived.keys() == required_suffixes(parts) else None

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


class Dequantiser(Rewriter):
    """Gives each quantised weight out as a plain one."""

    def take(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """`rewrite`, which never gives more than the plain fp32 weight."""
        module = name.rpartition(".")[0]
        weight = self._format_of(module)
        if weight == PLAIN:
            return name, tensor
        parts = self._collect(name, tensor)
        return None if parts is None else (f"{module}.weight", dequantise(weight, parts))

    def rewrite(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        plain = self.take(name, tensor)
        return [] if plain is None else [plain]


class Packer(Rewriter):
    """Gives each quantised weight out as `codes`, `scales`, `zeros`, `factors` of its layout."""

    def rewrite(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        module = name.rpartition(".")[0]
        weight = self._format_of(module)
        if weight == PLAIN:
            return [(name, tensor)]
        parts = self._collect(name, tensor)
        if parts is None:
            return []
        try:
            packed = pack(weight, parts)
        except ValueError as error:
            raise ValueError(f"{module} (stored as {weight.name}): {error}") from None
        return [(f"{module}.{part}", value) for part, value in packed.items()]
