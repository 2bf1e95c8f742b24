"""Stored tensors of a weight into the one layout that the CPU kernels read, byte for byte.

Codes keep their bytes; only their order changes. Scales keep their value: those of blocks of rows
are repeated for each row (3 % more memory), zero points take a byte each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal

import torch
from torch import Tensor

from m3_kernels.stored_matrix import FOUR_BITS, UNIT, Kind, StoredMatrix
from m3_plugin.quantization.codecs import unpack_nibbles
from m3_plugin.quantization.formats import (
    MX_GROUP,
    NVFP4_GROUP,
    Fp8,
    Fp8Block,
    GptqInt4,
    Mxfp4,
    Mxfp8,
    Nvfp4,
    PackedInt4,
    WeightFormat,
)

PartName = Literal["codes", "scales", "zeros", "factors"]
PART_NAMES: tuple[PartName, ...] = ("codes", "scales", "zeros", "factors")

# Groups of so many columns have fp32 scales, which hold those of every file; smaller groups the
# dtype that files usually have, for their scales weigh more.
_WIDE_SCALES_FROM = 64
# The kernels read e4m3 as fp16 and multiply by 256.
_LARGEST_EXPONENT = 246


@dataclass(frozen=True)
class Layout:
    """How weights of one format lie in memory.

    Attributes
    ----------
    kind : of `StoredMatrix`
    group : columns that share a scale; None for a whole row
    scale_dtype : of the scales
    has_zeros : whether each scale has a zero point
    """

    kind: Kind
    group: int | None
    scale_dtype: torch.dtype = torch.uint8
    has_zeros: bool = False

    def empty(self, rows: tuple[int, ...], columns: int) -> dict[PartName, Tensor]:
        """Uninitialised parts of a weight [*rows, columns].

        Raises
        ------
        ValueError : columns that are no whole number of groups, as too many ranks leave them.
        """
        group = self.group or columns
        step = UNIT if self.group is None else self.group
        if columns % step:
            raise ValueError(
                f"{self.kind} weights need columns in multiples of {step} on every rank; got "
                f"{columns}: use fewer tensor parallel ranks, or set M3_PLUGIN_DEQUANTIZE=1 if "
                "memory suffices"
            )
        width = columns // 2 if self.kind in FOUR_BITS else columns
        parts: dict[PartName, Tensor] = {
            "codes": torch.empty(*rows, width, dtype=torch.uint8),
            "scales": torch.empty(*rows, columns // group, dtype=self.scale_dtype),
        }
        if self.has_zeros:
            parts["zeros"] = torch.empty(*rows, columns // group, dtype=torch.uint8)
        if self.kind == "nvfp4":
            parts["factors"] = torch.empty(*rows, dtype=torch.float32)
        return parts

    def matrix(self, parts: Mapping[PartName, Tensor]) -> StoredMatrix:
        """The weight that parts made by `empty` hold by now."""
        width = parts["codes"].shape[-1]
        columns = width * 2 if self.kind in FOUR_BITS else width
        return StoredMatrix(
            self.kind,
            parts["codes"],
            parts["scales"],
            self.group or columns,
            parts.get("zeros"),
            parts.get("factors"),
        )

    def column_dim(self, part: PartName) -> int | None:
        """Dimension behind the rows along which ranks that share columns cut a part."""
        whole_row = part != "codes" and self.group is None
        return None if part == "factors" or whole_row else 1


def layout_of(weight: WeightFormat) -> Layout | None:
    """The layout of a format; None of one that the kernels have none for.

    Those are plain weights, integers whose columns were reordered (`desc_act`) and groups or blocks
    that are no multiple of 16 columns.
    """
    match weight:
        case Mxfp8():
            return Layout("mxfp8", MX_GROUP)
        case Mxfp4():
            return Layout("mxfp4", MX_GROUP)
        case Nvfp4():
            return Layout("nvfp4", NVFP4_GROUP)
        case Fp8Block(block_columns=columns) if columns % UNIT == 0:
            return Layout("fp8", columns, torch.float32)
        case Fp8():
            return Layout("fp8", None, torch.float32)
        case PackedInt4(act_order=False):
            return _int4(weight.group_size, weight.symmetric, usual=torch.bfloat16)
        case GptqInt4(act_order=False):
            return _int4(weight.group_size, weight.symmetric, usual=torch.float16)
    return None


def _int4(group: int | None, symmetric: bool, *, usual: torch.dtype) -> Layout | None:
    if group is not None and group % UNIT:
        return None
    wide = group is None or group >= _WIDE_SCALES_FROM
    return Layout("int4", group, torch.float32 if wide else usual, not symmetric)


@singledispatch
def pack(weight: WeightFormat, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    """A weight's parts as its `layout_of` has them.

    Parameters
    ----------
    weight : how it is stored
    parts : its tensors by suffix, as described by `weight.parts`

    Raises
    ------
    TypeError : a format without a layout
    ValueError : codes or scales that are no numbers, or that the layout cannot hold.
    """
    raise TypeError(f"no layout for {type(weight).__name__}")


@pack.register(Mxfp8)
def _(weight: Mxfp8, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    return {"codes": _e4m3(parts["weight"]), "scales": _powers(parts[weight.scale])}


@pack.register(Mxfp4)
def _(weight: Mxfp4, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    return {"codes": parts[weight.weight], "scales": _powers(parts[weight.scale])}


@pack.register(Nvfp4)
def _(weight: Nvfp4, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    codes = parts[weight.weight]
    factor = parts[weight.global_scale].float().reshape(())
    factor = 1 / factor if weight.divides else factor
    return {
        "codes": codes,
        "scales": _e4m3(parts["weight_scale"]),
        "factors": factor.expand(len(codes)),
    }


@pack.register(Fp8Block)
def _(weight: Fp8Block, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    codes = _e4m3(parts["weight"])
    scales = parts[weight.scale].float().repeat_interleave(weight.block_rows, dim=0)
    return {"codes": codes, "scales": scales[: len(codes)]}


@pack.register(Fp8)
def _(weight: Fp8, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    codes = _e4m3(parts["weight"])
    scales = parts["weight_scale"].float().reshape(-1, 1)
    return {"codes": codes, "scales": scales.expand(len(codes), 1)}


@pack.register(PackedInt4)
def _(weight: PackedInt4, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    rows, columns = parts["weight_shape"].tolist()
    # eight columns per word, lowest bits first: on a little-endian machine in order already
    codes = parts["weight_packed"].contiguous().view(torch.uint8)[:, : columns // 2]
    packed: dict[PartName, Tensor] = {
        "codes": codes,
        "scales": _scales(weight, parts["weight_scale"]),
    }
    if not weight.symmetric:
        zeros = unpack_nibbles(parts["weight_zero_point"].T).T[:rows]
        packed["zeros"] = zeros.to(torch.uint8)
    return packed


@pack.register(GptqInt4)
def _(weight: GptqInt4, parts: Mapping[str, Tensor]) -> dict[PartName, Tensor]:
    packed: dict[PartName, Tensor] = {
        "codes": parts["qweight"].T.contiguous().view(torch.uint8),
        "scales": _scales(weight, parts["scales"].T),
    }
    if not weight.symmetric:
        zeros = unpack_nibbles(parts["qzeros"]).T + weight.stored_zero_offset
        packed["zeros"] = zeros.to(torch.uint8)
    return packed


def _e4m3(values: Tensor) -> Tensor:
    """Bytes of e4m3 numbers."""
    codes = values.view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise ValueError("it holds codes that are not a number; download the checkpoint again")
    return codes


def _powers(exponents: Tensor) -> Tensor:
    """Bytes of powers of two."""
    stored = exponents.view(torch.uint8)
    if bool((stored > _LARGEST_EXPONENT).any()):
        raise ValueError(
            f"it holds scales above 2 ** {_LARGEST_EXPONENT - 127} or that are not a number; "
            "download the checkpoint again"
        )
    return stored


def _scales(weight: WeightFormat, scales: Tensor) -> Tensor:
    layout = layout_of(weight)
    assert layout is not None
    held = scales.to(layout.scale_dtype)
    if not torch.equal(held.float(), scales.float()):
        raise ValueError(
            f"its scales are {scales.dtype} and do not fit into {layout.scale_dtype}, in which "
            f"groups of {layout.group} columns have theirs here; set M3_PLUGIN_DEQUANTIZE=1 if "
            "memory suffices"
        )
    return held
