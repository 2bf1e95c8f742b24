"""Weights in the bytes they are stored in, brought into one layout for all formats.

Checkpoints pack the same few kinds of codes in a dozen ways. Here a row's codes follow each other,
and so do its scales, so that rows can be put below each other (fused projections) and columns be
cut at groups (tensor parallel ranks) without a look at the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from m3_kernels import validation

Kind = Literal["plain", "mxfp8", "fp8", "mxfp4", "nvfp4", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Columns decoded at once: every group of columns is a multiple of it.
UNIT = 16
FOUR_BITS: frozenset[Kind] = frozenset({"mxfp4", "nvfp4", "int4"})
# Columns that share a scale, where the kind says so.
GROUP_OF_KIND = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
# Zero point of int4 codes that have none of their own.
MIDDLE = 8

_SCALE_DTYPES: dict[Kind, tuple[torch.dtype, ...]] = {
    "plain": (),
    "mxfp8": (torch.uint8,),
    "fp8": (torch.float32,),
    "mxfp4": (torch.uint8,),
    "nvfp4": (torch.uint8,),
    "int4": validation.FLOAT_DTYPES,
}


@dataclass(frozen=True)
class StoredMatrix:
    """One weight [rows, columns], or one per group [groups, rows, columns], as codes and scales.

    A weight is `(value(code) - zero) * (scale * factor)`, in fp32, each product rounded once.

    Attributes
    ----------
    kind : what the codes are: "plain" numbers; e4m3 with powers of two ("mxfp8") or fp32 scales
        ("fp8"); e2m1 with powers of two ("mxfp4") or e4m3 scales and factors ("nvfp4"); "int4"
    codes : uint8 [..., rows, columns], or [..., rows, columns / 2] of four bits, the even column in
        the low half; fp32, bf16 or fp16 if plain. Codes of e4m3 must be numbers (not 0x7f, 0xff)
    scales : [..., rows, ceil(columns / group)]: uint8 exponents plus 127, at most 246 (mxfp8,
        mxfp4), uint8 bits of e4m3 (nvfp4), fp32 (fp8), fp32, bf16 or fp16 (int4); None if plain
    group : columns that share a scale, a multiple of 16; 0 if plain
    zeros : uint8 [..., rows, ceil(columns / group)] of int4 codes; None is 8 everywhere
    factors : fp32 [..., rows] of nvfp4

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a kind, shape, device or layout is not in the contract
    """

    kind: Kind
    codes: Tensor
    scales: Tensor | None = None
    group: int = 0
    zeros: Tensor | None = None
    factors: Tensor | None = None

    def __post_init__(self) -> None:
        kind, codes = self.kind, self.codes
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if codes.dim() not in (2, 3):
            raise ValueError(f"codes must be [rows, n] or [groups, rows, n]; got {codes.dim()}-d")
        if kind == "plain":
            validation.require_float("codes", codes)
        else:
            validation.require_dtype("codes", codes, torch.uint8)
        if self.columns % UNIT:
            raise ValueError(f"columns must be a multiple of {UNIT}; got {self.columns}")
        wanted = {
            "scales": kind != "plain",
            "factors": kind == "nvfp4",
        }
        for name, needed in wanted.items():
            if (getattr(self, name) is not None) != needed:
                raise ValueError(f"{name} must be {'given' if needed else 'None'} for {kind}")
        if self.zeros is not None and kind != "int4":
            raise ValueError(f"zeros must be None for {kind}")
        group = GROUP_OF_KIND.get(kind, self.group)
        if self.group != group or group % UNIT or (group <= 0) != (kind == "plain"):
            rule = str(group) if kind in GROUP_OF_KIND else f"a multiple of {UNIT} above 0"
            raise ValueError(
                f"group must be {'0' if kind == 'plain' else rule} for {kind}; got {self.group}"
            )
        self._require_parts()

    def _require_parts(self) -> None:
        rows = self.codes.shape[:-1]
        groups = -(-self.columns // self.group) if self.group else 0
        parts = {
            "codes": (self.codes, self.codes.shape),
            "scales": (self.scales, (*rows, groups)),
            "zeros": (self.zeros, (*rows, groups)),
            "factors": (self.factors, rows),
        }
        for name, (tensor, shape) in parts.items():
            if tensor is None:
                continue
            validation.require_shape(
                name, tensor, tuple(shape), "as the codes have rows and groups"
            )
            validation.require_device(name, tensor, self.codes.device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}")
        if self.scales is not None and self.scales.dtype not in _SCALE_DTYPES[self.kind]:
            wanted = " or ".join(str(dtype) for dtype in _SCALE_DTYPES[self.kind])
            raise TypeError(f"scales must be {wanted} for {self.kind}; got {self.scales.dtype}")
        if self.zeros is not None:
            validation.require_dtype("zeros", self.zeros, torch.uint8)
        if self.factors is not None:
            validation.require_dtype("factors", self.factors, torch.float32)

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.codes.shape[-2]

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.codes.shape[-1] * (2 if self.kind in FOUR_BITS else 1)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors it consists of."""
        found = (self.codes, self.scales, self.zeros, self.factors)
        return tuple(part for part in found if part is not None)

    @property
    def grouped(self) -> StoredMatrix:
        """The same with a dimension of groups, which is 1 if there was none."""
        if self.codes.dim() == 3:
            return self
        scales, zeros, factors = (
            None if part is None else part[None] for part in (self.scales, self.zeros, self.factors)
        )
        return StoredMatrix(self.kind, self.codes[None], scales, self.group, zeros, factors)

    def part(self, group: int, rows: slice) -> StoredMatrix:
        """Some rows of one group's matrix, without a dimension of groups."""
        whole = self.grouped
        scales, zeros, factors = (
            None if part is None else part[group, rows]
            for part in (whole.scales, whole.zeros, whole.factors)
        )
        return StoredMatrix(self.kind, whole.codes[group, rows], scales, self.group, zeros, factors)
