"""How one linear weight is stored: which tensors, of which shape and dtype, in which order of bits.

A format describes; `codecs` turns its tensors back into numbers. A weight is [rows, columns] as
`torch.nn.Linear` holds it; a format's parts are the tensors a checkpoint stores in its place, by
the suffix behind the module's name. Dtypes are safetensors' names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

FLOAT_DTYPES = ("BF16", "F16", "F32")

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

# OCP microscaling: 32 values share one power of two, stored as its exponent plus 127.
MX_GROUP = 32
MX_SCALE_DTYPES = ("U8", "F8_E8M0")
NVFP4_GROUP = 16
# Four-bit integers per int32 word.
INT4_PER_WORD = 8


@dataclass(frozen=True)
class Part:
    """One stored tensor.

    Attributes
    ----------
    shapes : shapes it may have; exporters disagree on scalars, which are [] or [1]
    dtypes : dtypes it may have, the usual one first
    required : whether the weight has no meaning without it
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    required: bool = True

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shapes[0]) * DTYPE_BYTES[self.dtypes[0]]


def _part(*shape: int, dtypes: tuple[str, ...], required: bool = True) -> Part:
    return Part((shape,), dtypes, required)


def _scalar(*, required: bool = True) -> Part:
    return Part(((), (1,)), FLOAT_DTYPES[::-1], required)


class WeightFormat(Protocol):
    """Storage of one linear weight."""

    @property
    def name(self) -> str:
        """Name by which docs, errors and the plan speak of it."""
        ...

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Suffix -> tensor, for a weight of [rows, columns].

        Raises
        ------
        ValueError : the format cannot hold that shape.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """The weight itself."""

    name: str = field(default="plain", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        return {"weight": _part(rows, columns, dtypes=FLOAT_DTYPES)}


@dataclass(frozen=True)
class Mxfp8:
    """e4m3 values, one power of two per 32 columns. `scale` is the suffix of the powers."""

    scale: str = "weight_scale_inv"
    name: str = field(default="mxfp8", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = _groups(columns, MX_GROUP, name=self.name)
        return {
            "weight": _part(rows, columns, dtypes=("F8_E4M3",)),
            self.scale: _part(rows, groups, dtypes=MX_SCALE_DTYPES),
        }


@dataclass(frozen=True)
class Mxfp4:
    """e2m1 values, two per byte (the even column in the low half), one power of two per 32."""

    weight: str = "weight"
    scale: str = "weight_scale"
    name: str = field(default="mxfp4", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = _groups(columns, MX_GROUP, name=self.name)
        return {
            self.weight: _part(rows, columns // 2, dtypes=("U8",)),
            self.scale: _part(rows, groups, dtypes=MX_SCALE_DTYPES),
        }


@dataclass(frozen=True)
class Nvfp4:
    """e2m1 values as in `Mxfp4`, one e4m3 scale per 16 columns, one fp32 scale for the tensor.

    Attributes
    ----------
    weight, global_scale, input_scale : suffixes
    divides : whether values are divided by the tensor's scale (compressed-tensors) or multiplied
        by it (ModelOpt)
    """

    weight: str = "weight"
    global_scale: str = "weight_scale_2"
    input_scale: str = "input_scale"
    divides: bool = False
    name: str = field(default="nvfp4", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = _groups(columns, NVFP4_GROUP, name=self.name)
        return {
            self.weight: _part(rows, columns // 2, dtypes=("U8",)),
            "weight_scale": _part(rows, groups, dtypes=("F8_E4M3",)),
            self.global_scale: _scalar(),
            self.input_scale: _scalar(required=False),
        }


@dataclass(frozen=True)
class PackedInt4:
    """compressed-tensors: eight columns per int32, lowest bits first, value + 8 stored.

    Attributes
    ----------
    group_size : columns that share a scale, None for a whole row
    symmetric : without zero points
    act_order : columns were reordered, and each names its group
    """

    group_size: int | None
    symmetric: bool
    act_order: bool = False
    name: str = field(default="int4", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = _groups(columns, self.group_size or columns, name=self.name)
        words = math.ceil(columns / INT4_PER_WORD)
        parts = {
            "weight_packed": _part(rows, words, dtypes=("I32",)),
            "weight_scale": _part(rows, groups, dtypes=FLOAT_DTYPES),
            "weight_shape": _part(2, dtypes=("I64", "I32")),
            "weight_g_idx": _part(columns, dtypes=("I32", "I64"), required=self.act_order),
        }
        if not self.symmetric:
            words = math.ceil(rows / INT4_PER_WORD)
            parts["weight_zero_point"] = _part(words, groups, dtypes=("I32",))
        return parts


@dataclass(frozen=True)
class GptqInt4:
    """GPTQ: the transposed weight, eight input columns per int32, lowest bits first.

    Attributes
    ----------
    group_size : columns that share a scale, None for a whole row
    symmetric : the zero point is 8 everywhere
    stored_zero_offset : 1 in the original format, which stores zero points less one; 0 in its
        second version
    act_order : columns were reordered, and each names its group; otherwise `g_idx` says nothing new
    """

    group_size: int | None
    symmetric: bool
    act_order: bool = False
    stored_zero_offset: int = 1
    name: str = field(default="gptq-int4", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = _groups(columns, self.group_size or columns, name=self.name)
        for side, size in (("input", columns), ("output", rows)):
            if size % INT4_PER_WORD:
                raise ValueError(
                    f"{self.name} needs {side} channels in multiples of {INT4_PER_WORD}; got {size}"
                )
        return {
            "qweight": _part(columns // INT4_PER_WORD, rows, dtypes=("I32",)),
            "qzeros": _part(groups, rows // INT4_PER_WORD, dtypes=("I32",)),
            "scales": _part(groups, rows, dtypes=("F16", "BF16", "F32")),
            "g_idx": _part(columns, dtypes=("I32", "I64"), required=self.act_order),
        }


@dataclass(frozen=True)
class Fp8Block:
    """e4m3 values, one scale per block of rows and columns; blocks at the edges may be smaller."""

    block_rows: int = 128
    block_columns: int = 128
    scale: str = "weight_scale_inv"
    name: str = field(default="fp8-block", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        blocks = math.ceil(rows / self.block_rows), math.ceil(columns / self.block_columns)
        return {
            "weight": _part(rows, columns, dtypes=("F8_E4M3",)),
            self.scale: _part(*blocks, dtypes=FLOAT_DTYPES[::-1]),
            "input_scale": _scalar(required=False),
        }


@dataclass(frozen=True)
class Fp8:
    """e4m3 values with one scale for the tensor or one per row."""

    per_row: bool = False
    name: str = field(default="fp8", init=False)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        scale = Part(((rows, 1), (rows,)), FLOAT_DTYPES[::-1]) if self.per_row else _scalar()
        return {
            "weight": _part(rows, columns, dtypes=("F8_E4M3",)),
            "weight_scale": scale,
            "input_scale": _scalar(required=False),
        }


def stored_bytes(weight: WeightFormat, *, rows: int, columns: int) -> int:
    """Bytes of a [rows, columns] weight in a checkpoint, its scales included."""
    parts = weight.parts(rows, columns).values()
    return sum(part.num_bytes for part in parts if part.required)


def required_suffixes(parts: Mapping[str, Part]) -> frozenset[str]:
    """Suffixes without which a weight has no meaning."""
    return frozenset(suffix for suffix, part in parts.items() if part.required)


def require_part(
    weight: WeightFormat,
    parts: Mapping[str, Part],
    *,
    tensor: str,
    dtype: str,
    shape: tuple[int, ...],
    file: str | None = None,
) -> None:
    """Refuse a stored tensor that is not what its format says.

    Parameters
    ----------
    weight, parts : the format, and its parts for this weight's shape
    tensor, dtype, shape, file : what is stored, and where if known

    Raises
    ------
    ValueError : unknown suffix, wrong dtype or shape; names tensor and file.
    """
    module, _, suffix = tensor.rpartition(".")
    where = f"tensor {tensor}" + (f" in {file}" if file else "")
    part = parts.get(suffix)
    if part is None:
        raise ValueError(
            f"{where} is no part of a weight stored as {weight.name} ({', '.join(parts)}), which "
            f"config.json's quantization_config says {module} is; if the file is right, the "
            "config's list of unquantised modules is not the checkpoint's own"
        )
    if dtype not in part.dtypes:
        raise ValueError(
            f"{where} must be {' or '.join(part.dtypes)} in a weight stored as {weight.name}; "
            f"got {dtype}"
        )
    if shape not in part.shapes:
        wanted = " or ".join(str(list(choice)) for choice in part.shapes)
        raise ValueError(
            f"{where} must have shape {wanted} in a weight stored as {weight.name}; "
            f"got {list(shape)}"
        )


def require_all_parts(
    weight: WeightFormat,
    parts: Mapping[str, Part],
    *,
    module: str,
    found: Collection[str],
    file: str | None = None,
) -> None:
    """Refuse a weight with a part missing.

    Parameters
    ----------
    weight, parts : the format, and its parts for this weight's shape
    module, found, file : whose weight, suffixes of the parts found, and where they are if known

    Raises
    ------
    ValueError : names the missing tensors, and the file with the others.
    """
    missing = sorted(required_suffixes(parts) - set(found))
    if missing:
        raise ValueError(
            f"checkpoint lacks {', '.join(f'{module}.{suffix}' for suffix in missing)}, without "
            f"which {module} (stored as {weight.name}{f' in {file}' if file else ''}) has no "
            "meaning; are all shards there?"
        )


def _groups(columns: int, group: int, *, name: str) -> int:
    if columns % group:
        raise ValueError(f"{name} needs input channels in multiples of {group}; got {columns}")
    return columns // group
