"""`cvt`: between integers, floats, and pairs of small floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from m3_kernels.testing.ptx.arithmetic import Operation, flushed, unsupported
from m3_kernels.testing.ptx.parse import Instruction
from m3_kernels.testing.ptx.values import (
    DTYPES,
    Array,
    bf16_of,
    f16_of,
    fp8_of,
    halves,
    joined,
    of_bf16,
    of_fp8,
)

_WHOLE: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
_FLOATS = ("f16", "bf16", "f32", "f64", "e4m3", "e5m2")
_MODIFIERS = ("rn", "rz", "ftz", "sat", "satfinite", *_WHOLE)


def conversion(instruction: Instruction) -> Operation:
    """What a `cvt` computes; pairs are packed from two operands, the first into the upper half."""
    *modifiers, target, source = instruction.modifiers
    if any(one not in _MODIFIERS for one in modifiers):
        raise unsupported(instruction)
    if target.endswith("x2"):
        narrow = _between(instruction, target.removesuffix("x2"), source.removesuffix("x2"))
        if source.endswith("x2"):
            return Operation((source,), lambda pair: joined(*map(narrow, _parts(pair, source))))
        return Operation((source, source), lambda high, low: joined(narrow(high), narrow(low)))
    return Operation((source,), _between(instruction, target, source))


def _parts(pair: Array, type_: str) -> tuple[Array, Array]:
    high, low = halves(pair)
    dtype = DTYPES[type_.removesuffix("x2")]
    return high.view(dtype), low.view(dtype)


def _between(instruction: Instruction, target: str, source: str) -> Callable[[Array], Array]:
    modifiers = instruction.modifiers[:-2]
    if target in _FLOATS and source in _FLOATS:
        return _floats(instruction, target, source)
    dtype = DTYPES[target]
    if target in _FLOATS:
        if "rn" not in modifiers or target not in ("f32", "f64", "f16"):
            raise unsupported(instruction)
        # float32 holds all that float16 can tell apart, but not the other way round
        return lambda values: values.astype(dtype)
    if source in _FLOATS:
        whole = next((_WHOLE[one] for one in modifiers if one in _WHOLE), None)
        if whole is None or source not in ("f32", "f16"):
            raise unsupported(instruction)
        least, most = (float(edge) for edge in (np.iinfo(dtype).min, np.iinfo(dtype).max))

        def to_integers(values: Array) -> Array:
            wide = whole(values.astype(np.float64))
            inside = np.where(np.isnan(wide), 0.0, np.clip(wide, least, most))
            # the largest 64-bit integers are no doubles
            found = np.where(inside >= 2.0**63, 0.0, inside).astype(np.int64).astype(dtype)
            return np.where(inside >= most, np.iinfo(dtype).max, found).astype(dtype)

        return to_integers
    if "sat" in modifiers:
        raise unsupported(instruction)
    return lambda values: values.astype(dtype)


def _floats(instruction: Instruction, target: str, source: str) -> Callable[[Array], Array]:
    """By way of float32, which holds the numbers of all smaller types."""
    modifiers = instruction.modifiers[:-2]
    if "f64" in (target, source) or "sat" in modifiers:
        raise unsupported(instruction)
    towards_zero = "rz" in modifiers
    whole = next((_WHOLE[one] for one in modifiers if one in _WHOLE), None)

    def read(values: Array) -> Array:
        if source == "bf16":
            return of_bf16(values)
        if source in ("e4m3", "e5m2"):
            return of_fp8(values, source)
        found = values.astype(np.float32)
        return flushed(found) if "ftz" in modifiers else found

    def write(values: Array) -> Array:
        if whole is not None:
            values = whole(values)
        if target == "bf16":
            return bf16_of(values, towards_zero=towards_zero)
        if target == "f16":
            return f16_of(values, towards_zero=towards_zero)
        return values if target == "f32" else fp8_of(values, target)

    if target in ("e4m3", "e5m2") and "satfinite" not in modifiers:
        raise unsupported(instruction)
    return lambda values: write(np.asarray(read(values)))
