"""Stored tensors back to numbers, in plain torch on any device: the oracle for every faster way.

All arithmetic is fp32 and follows the formats' own definitions; a power of two times an e4m3 or
e2m1 value is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor

from m3_plugin.quantization.formats import (
    INT4_PER_WORD,
    MX_GROUP,
    NVFP4_GROUP,
    Fp8,
    Fp8Block,
    GptqInt4,
    Mxfp4,
    Mxfp8,
    Nvfp4,
    PackedInt4,
    Plain,
    WeightFormat,
)

# e2m1 by code: sign, two bits of exponent, one of mantissa.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The exponent that stands for "not a number" in a power-of-two scale.
_E8M0_NAN = 255
_FP32_MANTISSA_BITS = 23
_FP32_TWO_TO_MINUS_127 = 1 << 22


@singledispatch
def dequantise(weight: WeightFormat, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight as fp32 [rows, columns].

    Parameters
    ----------
    weight : how it is stored
    parts : its tensors by suffix, as described by `weight.parts`

    Raises
    ------
    TypeError : a format without a codec.
    """
    raise TypeError(f"no codec for {type(weight).__name__}")


@dequantise.register(Plain)
def _(weight: Plain, parts: Mapping[str, Tensor]) -> Tensor:
    return parts["weight"].float()


@dequantise.register(Mxfp8)
def _(weight: Mxfp8, parts: Mapping[str, Tensor]) -> Tensor:
    return _scale_groups(parts["weight"].float(), powers_of_two(parts[weight.scale]), MX_GROUP)


@dequantise.register(Mxfp4)
def _(weight: Mxfp4, parts: Mapping[str, Tensor]) -> Tensor:
    values = unpack_e2m1(parts[weight.weight])
    return _scale_groups(values, powers_of_two(parts[weight.scale]), MX_GROUP)


@dequantise.register(Nvfp4)
def _(weight: Nvfp4, parts: Mapping[str, Tensor]) -> Tensor:
    factor = parts[weight.global_scale].float().reshape(())
    scales = parts["weight_scale"].float()
    scales = scales / factor if weight.divides else scales * factor
    return _scale_groups(unpack_e2m1(parts[weight.weight]), scales, NVFP4_GROUP)


@dequantise.register(PackedInt4)
def _(weight: PackedInt4, parts: Mapping[str, Tensor]) -> Tensor:
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float()
    values = unpack_nibbles(parts["weight_packed"])[:, :columns].float()
    zeros = torch.full_like(scales, 8.0)
    if not weight.symmetric:
        # packed along the rows
        zeros = unpack_nibbles(parts["weight_zero_point"].T).T[:rows].float()
    stored_order = parts["weight_g_idx"] if weight.act_order else None
    group = _group_of_column(stored_order, scales=scales, columns=columns)
    return (values - zeros[:, group]) * scales[:, group]


@dequantise.register(GptqInt4)
def _(weight: GptqInt4, parts: Mapping[str, Tensor]) -> Tensor:
    values = unpack_nibbles(parts["qweight"].T).float()
    scales = parts["scales"].float().T
    zeros = torch.full_like(scales, 8.0)
    if not weight.symmetric:
        zeros = (unpack_nibbles(parts["qzeros"]).T + weight.stored_zero_offset).float()
    stored_order = parts["g_idx"] if weight.act_order else None
    group = _group_of_column(stored_order, scales=scales, columns=values.shape[1])
    return (values - zeros[:, group]) * scales[:, group]


@dequantise.register(Fp8Block)
def _(weight: Fp8Block, parts: Mapping[str, Tensor]) -> Tensor:
    values = parts["weight"].float()
    rows, columns = values.shape
    scales = parts[weight.scale].float()
    scales = scales.repeat_interleave(weight.block_rows, dim=0)[:rows]
    return values * scales.repeat_interleave(weight.block_columns, dim=1)[:, :columns]


@dequantise.register(Fp8)
def _(weight: Fp8, parts: Mapping[str, Tensor]) -> Tensor:
    # [], [1], [rows] and [rows, 1] all scale whole rows
    return parts["weight"].float() * parts["weight_scale"].float().reshape(-1, 1)


def powers_of_two(exponents: Tensor) -> Tensor:
    """e8m0 scales, as bytes or in torch's own dtype, to fp32: 2 ** (stored - 127).

    Exponent 255 is not a number; 0 is 2 ** -127, which fp32 holds as a subnormal. Made of bits,
    because `exp2` need not be exact on every device.
    """
    stored = exponents.view(torch.uint8).int()
    bits = torch.where(stored == 0, _FP32_TWO_TO_MINUS_127, stored << _FP32_MANTISSA_BITS)
    return bits.view(torch.float32).masked_fill(stored == _E8M0_NAN, torch.nan)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Two e2m1 values per byte, low half first: uint8 [..., n] to fp32 [..., 2 n]."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=packed.device)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return table[codes.int()]


def unpack_nibbles(words: Tensor) -> Tensor:
    """Eight unsigned four-bit values per word, lowest bits first: [r, n] to [r, 8 n], int32."""
    shifts = torch.arange(INT4_PER_WORD, device=words.device, dtype=torch.int32) * 4
    return ((words.unsqueeze(-1) >> shifts) & 0xF).flatten(-2)


def _group_of_column(stored: Tensor | None, *, scales: Tensor, columns: int) -> Tensor:
    """Scale group of each column: in order, unless the exporter reordered them."""
    if stored is not None:
        return stored.long()
    groups = scales.shape[1]
    return torch.arange(columns, device=scales.device) // (columns // groups)


def _scale_groups(values: Tensor, scales: Tensor, group: int) -> Tensor:
    return (values.unflatten(-1, (-1, group)) * scales.unsqueeze(-1)).flatten(-2)
