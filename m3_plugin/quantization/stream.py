"""Quantised tensors in, plain weights out, while a host loads: works with any chip and host.

A host hands over tensor after tensor in an order of its own. The tensors of one weight wait for
each other here and leave as one plain `weight`, so the host needs no idea of the checkpoint's
format. Memory: the plain weights, plus the parts of the few weights that are not complete yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from m3_plugin.checkpoint import TEXT_PREFIX, linear_shape
from m3_plugin.config import M3Config
from m3_plugin.quantization.codecs import dequantise
from m3_plugin.quantization.dialects import PLAIN
from m3_plugin.quantization.formats import (
    CACHE_SCALES,
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


def dequantised(
    weights: Iterable[tuple[str, Tensor]], *, config: M3Config, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The same checkpoint as if it were stored plain.

    Parameters
    ----------
    weights : names and tensors as published
    config : what the checkpoint says about itself
    dtype : of the weights that were quantised

    Raises
    ------
    ValueError : a part with a wrong shape or dtype, or one that never came; names the tensor.
    """
    if config.quantization is None:
        yield from weights
        return
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        stored, _, suffix = name.rpartition(".")
        weight = config.quantization.format_of(stored.removeprefix(TEXT_PREFIX))
        if weight == PLAIN or suffix in CACHE_SCALES:
            yield name, tensor
            continue
        parts = weight.parts(*linear_shape(config, stored.removeprefix(TEXT_PREFIX)))
        require_part(
            weight,
            parts,
            tensor=name,
            dtype=SAFETENSORS_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
        )
        if not parts[suffix].required:
            continue
        arrived = waiting.setdefault(stored, {})
        arrived[suffix] = tensor
        if arrived.keys() == required_suffixes(parts):
            yield f"{stored}.weight", dequantise(weight, waiting.pop(stored)).to(dtype)
    for stored, arrived in waiting.items():
        weight = config.quantization.format_of(stored.removeprefix(TEXT_PREFIX))
        parts = weight.parts(*linear_shape(config, stored.removeprefix(TEXT_PREFIX)))
        require_all_parts(weight, parts, module=stored, found=arrived)
