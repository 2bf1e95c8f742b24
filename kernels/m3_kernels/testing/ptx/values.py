"""Values of registers as arrays over the threads, and the number formats that numpy has not.

A register holds its bits in whatever dtype of its size they were made in; who reads it looks at
them as his own type. bf16 and the 8-bit floats are held as their bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3_kernels.testing.ptx.parse import Immediate

Array = NDArray[Any]
Floats = NDArray[np.float32]

_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
UNSIGNED = {size: np.dtype(kind) for size, kind in _INTEGERS.items()}
DTYPES = {
    "pred": np.dtype(np.bool_),
    **{f"{letter}{8 * size}": kind for size, kind in UNSIGNED.items() for letter in "bu"},
    **{f"s{8 * size}": np.dtype(f"int{8 * size}") for size in UNSIGNED},
    **{"f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)},
    **{"bf16": UNSIGNED[2], "e4m3": UNSIGNED[1], "e5m2": UNSIGNED[1]},
    **{"f16x2": UNSIGNED[4], "bf16x2": UNSIGNED[4], "e4m3x2": UNSIGNED[2], "e5m2x2": UNSIGNED[2]},
}


NAN_16 = np.array(0x7FFF, np.uint16).view(np.float16)[()]


def seen_as(values: Array, dtype: np.dtype[Any]) -> Array:
    """The same bits as another dtype; the low ones of values that are wider.

    Raises
    ------
    TypeError : the dtype is wider, or one of both is a predicate
    """
    if values.dtype == dtype:
        return values
    have, want = values.dtype.itemsize, dtype.itemsize
    if "b" in (values.dtype.kind, dtype.kind) or have < want:
        raise TypeError(f"{values.dtype} bits cannot be read as {dtype}")
    if have > want:
        values = values.view(UNSIGNED[have]).astype(UNSIGNED[want])
    return values.view(dtype)


def widened(values: Array, size: int) -> Array:
    """Values in a register of so many bytes: signed integers keep their sign."""
    if values.dtype.kind == "b" or values.dtype.itemsize >= size:
        return values
    if values.dtype.kind == "i":
        return values.astype(f"int{8 * size}")
    return values.view(UNSIGNED[values.dtype.itemsize]).astype(UNSIGNED[size])


def constant(number: Immediate, dtype: np.dtype[Any]) -> Any:
    """An immediate operand as a scalar of a dtype."""
    if dtype.kind == "b":
        return np.bool_(number.bits != 0)
    size = dtype.itemsize
    if number.size == 8 and dtype == np.float32:
        return np.array(number.bits, np.uint64).view(np.float64)[()].astype(np.float32)
    return np.array(number.bits & (1 << 8 * size) - 1, UNSIGNED[size]).view(dtype)[()]


def bf16_of(values: Floats, *, towards_zero: bool = False) -> Array:
    """Bits of float32 numbers rounded to bf16, to nearest with ties to even unless told."""
    bits = values.view(np.uint32)
    rounding = np.uint32(0) if towards_zero else np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))
    rounded = (bits + rounding) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def of_bf16(bits: Array) -> Floats:
    """bf16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_of(values: Floats, *, towards_zero: bool = False) -> Array:
    """float32 numbers as float16, to nearest with ties to even unless told; every NaN is 0x7FFF."""
    rounded = values.astype(np.float16)
    if towards_zero:
        too_far = np.abs(rounded.astype(np.float32)) > np.abs(values)
        rounded = np.where(too_far, np.nextafter(rounded, np.float16(0)), rounded)
    return np.where(np.isnan(values), NAN_16, rounded)


@functools.cache
def _fp8_values(kind: str) -> Floats:
    """float32 of the 128 codes without a sign; what is no number is NaN, e5m2 has an infinity."""
    exponent_bits, bias = (4, 7) if kind == "e4m3" else (5, 15)
    fraction_bits = 7 - exponent_bits
    codes = np.arange(128)
    exponent, fraction = codes >> fraction_bits, codes & (1 << fraction_bits) - 1
    significand = np.where(exponent > 0, 1, 0) + fraction / (1 << fraction_bits)
    found = significand * 2.0 ** (np.maximum(exponent, 1) - bias)
    if kind == "e4m3":
        found[127] = np.nan
    else:
        found[124], found[125:] = np.inf, np.nan
    return found.astype(np.float32)


def of_fp8(codes: Array, kind: str) -> Floats:
    """e4m3 or e5m2 codes as float32."""
    magnitude = _fp8_values(kind)[codes & 0x7F]
    return np.where(codes & 0x80, -magnitude, magnitude)


def fp8_of(values: Floats, kind: str) -> Array:
    """Codes of float32 numbers: to nearest with ties to even; beyond the largest, the largest."""
    numbers = _fp8_values(kind)[: 127 if kind == "e4m3" else 124]
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    magnitude = np.abs(values)
    code = np.searchsorted(midpoints, magnitude, side="left")
    tie = magnitude == midpoints[np.minimum(code, len(midpoints) - 1)]
    code = np.where(tie & (code < len(midpoints)), code + (code & 1), code)
    code = np.where(np.isnan(values), 127, code)
    return (code | np.signbit(values).astype(np.int64) << 7).astype(np.uint8)


def halves(packed: Array) -> tuple[Array, Array]:
    """High and low part of each number, unsigned integers of half the size."""
    size = packed.dtype.itemsize // 2
    bits = packed.view(UNSIGNED[2 * size])
    shift = UNSIGNED[2 * size].type(8 * size)
    return (bits >> shift).astype(UNSIGNED[size]), bits.astype(UNSIGNED[size])


def joined(high: Array, low: Array) -> Array:
    """The opposite of `halves`."""
    size = high.dtype.itemsize
    whole = UNSIGNED[2 * size]
    high, low = (part.view(UNSIGNED[size]).astype(whole) for part in (high, low))
    return high << whole.type(8 * size) | low


def fused_multiply_add(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c rounded once.

    The product is exact in float64; the sum is rounded to odd there, which makes the second
    rounding, to float32, that of the exact sum.
    """
    product = np.asarray(a.astype(np.float64) * b.astype(np.float64))
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(away, 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)
