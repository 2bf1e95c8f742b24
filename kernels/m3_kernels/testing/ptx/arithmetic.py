"""Instructions that compute one value per thread from others: integers, floats, bits, predicates.

`OPERATIONS` says of each name what an instruction reads, what it gives, and the function between:
of arrays over the threads, and of scalars where operands are immediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3_kernels.testing.ptx.parse import Instruction
from m3_kernels.testing.ptx.values import (
    DTYPES,
    Array,
    bf16_of,
    fused_multiply_add,
    halves,
    joined,
    of_bf16,
)

Compute = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """What an instruction computes.

    Attributes
    ----------
    sources : types of its operands, "s32"
    compute : their arrays into that of the result
    """

    sources: tuple[str, ...]
    compute: Compute


def unsupported(instruction: Instruction) -> NotImplementedError:
    """The error for what no kernel of ours has needed yet."""
    return NotImplementedError(f"{instruction}: no such instruction in m3_kernels.testing.ptx yet")


# -- floats


FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
ROUNDED = ("rn", "ftz")


def flushed(values: Array) -> Array:
    """Subnormal float32 as zeros of their sign."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def _floating(instruction: Instruction, compute: Compute, *, known: tuple[str, ...]) -> Compute:
    """A function of float32 as the instruction's type and modifiers have it."""
    *modifiers, type_ = instruction.modifiers
    if any(one not in known for one in modifiers):
        raise unsupported(instruction)
    if "ftz" in modifiers:
        return lambda *sources: flushed(compute(*map(flushed, sources)))
    if type_ in ("f32", "f64"):
        return compute
    single = _of_16_bits(compute, type_.removesuffix("x2"))
    if not type_.endswith("x2"):
        return single

    def both(*sources: Array) -> Array:
        high, low = zip(*map(halves, sources), strict=True)
        return joined(single(*high), single(*low))

    return both


def _of_16_bits(compute: Compute, type_: str) -> Compute:
    """16-bit floats by way of float32, which rounds sums and products of two of them harmlessly."""
    if type_ == "bf16":
        return lambda *sources: bf16_of(np.asarray(compute(*map(of_bf16, sources))))
    return lambda *sources: compute(
        *(source.view(np.float16).astype(np.float32) for source in sources)
    ).astype(np.float16)


def _unary(function: Compute) -> Callable[[Instruction], Operation]:
    """Of float32, rounded from float64: approximations too give the nearest number."""

    def of(instruction: Instruction) -> Operation:
        if instruction.modifiers[-1] != "f32":
            raise unsupported(instruction)

        def compute(values: Array) -> Array:
            return function(values.astype(np.float64)).astype(np.float32)

        return Operation(("f32",), _floating(instruction, compute, known=(*ROUNDED, "approx")))

    return of


def _fma(instruction: Instruction) -> Operation:
    if instruction.modifiers[-1] != "f32":
        raise unsupported(instruction)
    return Operation(("f32",) * 3, _floating(instruction, fused_multiply_add, known=ROUNDED))


# -- floats and integers


def _both(
    count: int, integers: Compute, floats: Compute, *, known: tuple[str, ...] = ROUNDED
) -> Callable[[Instruction], Operation]:
    """One function for floats, rounded to nearest, and another for integers, which wrap."""

    def of(instruction: Instruction) -> Operation:
        type_ = instruction.modifiers[-1]
        sources = (type_,) * count
        if type_ in FLOATS:
            return Operation(sources, _floating(instruction, floats, known=known))
        if len(instruction.modifiers) > 1:
            raise unsupported(instruction)
        return Operation(sources, integers)

    return of


def _extreme(integers: Compute, floats: Compute) -> Callable[[Instruction], Operation]:
    """NaN loses against numbers, unless the instruction asks for it."""

    def of(instruction: Instruction) -> Operation:
        chosen = integers if "NaN" in instruction.modifiers else floats
        return _both(2, integers, chosen, known=("NaN", "ftz"))(instruction)

    return of


def _quotient(a: Array, b: Array) -> Array:
    """Integers divided towards zero; all bits set where by zero."""
    found = a // b
    found = found + ((a - found * b != 0) & ((a < 0) != (b < 0)))
    return np.where(b == 0, ~a.dtype.type(0), found.astype(a.dtype))


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, ~a.dtype.type(0), (a - _quotient(a, b) * b).astype(a.dtype))


def _mul(instruction: Instruction) -> Operation:
    type_ = instruction.modifiers[-1]
    if type_ in FLOATS:
        return Operation((type_,) * 2, _floating(instruction, np.multiply, known=ROUNDED))
    return Operation((type_,) * 2, _products(instruction))


def _mad(instruction: Instruction) -> Operation:
    part, type_ = instruction.modifiers[0], instruction.modifiers[-1]
    added = f"{type_[0]}{2 * int(type_[1:])}" if part == "wide" else type_
    product = _products(instruction)
    return Operation((type_, type_, added), lambda a, b, c: product(a, b) + c)


def _products(instruction: Instruction) -> Compute:
    """Low half, high half or all of integer products."""
    if len(instruction.modifiers) != 2:
        raise unsupported(instruction)
    part, type_ = instruction.modifiers
    dtype = DTYPES[type_]
    if part == "lo":
        return np.multiply
    if dtype.itemsize == 8:
        if part != "hi":
            raise unsupported(instruction)
        return high_of_64 if dtype.kind == "u" else _high_of_signed_64
    wide = np.dtype(f"{'int' if dtype.kind == 'i' else 'uint'}{16 * dtype.itemsize}")
    if part == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide)
    shift = wide.type(8 * dtype.itemsize)
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> shift).astype(dtype)


def high_of_64(a: Array, b: Array) -> Array:
    """The upper 64 bits of products of unsigned integers."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_high, a_low, b_high, b_low = a >> shift, a & low, b >> shift, b & low
    middle = a_high * b_low + (a_low * b_low >> shift)
    carried = (middle & low) + a_low * b_high
    return a_high * b_high + (middle >> shift) + (carried >> shift)


def _high_of_signed_64(a: Array, b: Array) -> Array:
    found = high_of_64(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
    return found - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


# -- bits


def _logic(count: int, bits: Compute, logical: Compute) -> Callable[[Instruction], Operation]:
    def of(instruction: Instruction) -> Operation:
        type_ = instruction.modifiers[-1]
        return Operation((type_,) * count, logical if type_ == "pred" else bits)

    return of


def _shift_left(instruction: Instruction) -> Operation:
    dtype = DTYPES[instruction.modifiers[-1]]
    bits = 8 * dtype.itemsize

    def compute(values: Array, amount: Array) -> Array:
        if np.ndim(amount) == 0 and amount < bits:
            return values << dtype.type(amount)
        moved = values << np.minimum(amount, bits - 1).astype(dtype)
        return np.where(amount < bits, moved, dtype.type(0))

    return Operation((instruction.modifiers[-1], "u32"), compute)


def _shift_right(instruction: Instruction) -> Operation:
    """Signs come in from above where the type is signed."""
    dtype = DTYPES[instruction.modifiers[-1]]
    bits = 8 * dtype.itemsize

    def compute(values: Array, amount: Array) -> Array:
        if np.ndim(amount) == 0 and amount < bits:
            return values >> dtype.type(amount)
        moved = values >> np.minimum(amount, bits - 1).astype(dtype)
        return moved if dtype.kind == "i" else np.where(amount < bits, moved, dtype.type(0))

    return Operation((instruction.modifiers[-1], "u32"), compute)


def _bfe(instruction: Instruction) -> Operation:
    """A field of bits; of a signed type its top bit is its sign, or the number's past its end."""
    type_ = instruction.modifiers[-1]
    dtype = DTYPES[type_]
    if dtype.itemsize != 4:
        raise unsupported(instruction)
    wide = np.dtype(np.int64 if dtype.kind == "i" else np.uint64)

    def compute(values: Array, start: Array, length: Array) -> Array:
        if np.ndim(start) == np.ndim(length) == 0 and length and start + length <= 32:
            return values << dtype.type(32 - start - length) >> dtype.type(32 - length)
        start, length = (
            np.minimum(part & np.uint32(0xFF), np.uint32(32)).astype(wide)
            for part in (start, length)
        )
        field = values.astype(wide) >> start & (wide.type(1) << length) - wide.type(1)
        if dtype.kind == "i":
            sign = np.where(length > 0, wide.type(1) << np.maximum(length, 1) - 1, 0)
            field = (field ^ sign) - sign
        return field.astype(dtype)

    return Operation((type_, "u32", "u32"), compute)


def _bfi(instruction: Instruction) -> Operation:
    """A field of bits put into another number."""
    if instruction.modifiers != ("b32",):
        raise unsupported(instruction)

    def compute(values: Array, into: Array, start: Array, length: Array) -> Array:
        start, length = (
            np.minimum(part & np.uint32(0xFF), np.uint32(32)).astype(np.uint64)
            for part in (start, length)
        )
        mask = (np.uint64(1) << length) - np.uint64(1) << start
        return (into & ~mask | values.astype(np.uint64) << start & mask).astype(np.uint32)

    return Operation(("b32", "b32", "u32", "u32"), compute)


def _popc(instruction: Instruction) -> Operation:
    return Operation(
        instruction.modifiers[-1:], lambda values: np.bitwise_count(values).astype(np.uint32)
    )


def _clz(instruction: Instruction) -> Operation:
    dtype = DTYPES[instruction.modifiers[-1]]

    def compute(values: Array) -> Array:
        shift = 1
        while shift < 8 * dtype.itemsize:
            values = values | values >> dtype.type(shift)
            shift *= 2
        return (8 * dtype.itemsize - np.bitwise_count(values)).astype(np.uint32)

    return Operation(instruction.modifiers[-1:], compute)


def _lop3(instruction: Instruction) -> Operation:
    """Any function of three bits: bit abc of the table is the result of a, b and c."""
    if instruction.modifiers != ("b32",):
        raise unsupported(instruction)

    def compute(a: Array, b: Array, c: Array, table: Any) -> Array:
        found = np.zeros((), np.uint32)
        for row in range(8):
            if int(table) >> row & 1:
                chosen = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                found = found | chosen
        return found

    return Operation(("b32", "b32", "b32", "u32"), compute)


def _prmt(instruction: Instruction) -> Operation:
    """Each nibble of the selector names one of eight bytes, or by its top bit that byte's sign."""
    if instruction.modifiers != ("b32",):
        raise unsupported(instruction)

    def compute(a: Array, b: Array, selector: Array) -> Array:
        pair = np.stack(np.broadcast_arrays(a, b), axis=-1).view(np.uint8)
        nibbles = selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        if nibbles.ndim == 1:
            chosen = pair[..., nibbles & 7]
        else:
            pair = np.broadcast_to(pair, (*nibbles.shape[:-1], 8))
            chosen = np.take_along_axis(pair, (nibbles & 7).astype(np.int64), axis=-1)
        if (nibbles & 8).any():
            signs = np.where(chosen & 0x80, np.uint8(0xFF), np.uint8(0))
            chosen = np.where(nibbles & 8, signs, chosen)
        return np.ascontiguousarray(chosen).view(np.uint32)[..., 0]

    return Operation(("b32", "b32", "b32"), compute)


# -- predicates


def _selp(instruction: Instruction) -> Operation:
    type_ = instruction.modifiers[-1]
    return Operation((type_, type_, "pred"), lambda a, b, chosen: np.where(chosen, a, b))


# Of floats, false where one is NaN.
_COMPARISONS: dict[str, Compute] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# True where one is NaN: what is not true of the opposite.
_UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
_OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _setp(instruction: Instruction) -> Operation:
    name, *rest, type_ = instruction.modifiers
    compute = _comparison(instruction, name, type_)
    if not rest:
        return Operation((type_, type_), compute)
    if len(rest) > 1 or rest[0] not in _JOINS:
        raise unsupported(instruction)
    join = _JOINS[rest[0]]
    return Operation((type_, type_, "pred"), lambda a, b, other: join(compute(a, b), other))


def _comparison(instruction: Instruction, name: str, type_: str) -> Compute:
    name = _OF_UNSIGNED.get(name, name)
    if name in _COMPARISONS:
        found = _COMPARISONS[name]
    elif name in _UNORDERED and type_ in FLOATS:
        opposite = _COMPARISONS[_UNORDERED[name]]

        def found(a: Array, b: Array) -> Array:
            return ~opposite(a, b)
    elif name in ("num", "nan") and type_ in FLOATS:

        def found(a: Array, b: Array) -> Array:
            return (np.isnan(a) | np.isnan(b)) == (name == "nan")
    else:
        raise unsupported(instruction)
    return found if type_ != "bf16" else lambda a, b: found(of_bf16(a), of_bf16(b))


def _set(instruction: Instruction) -> Operation:
    """1.0 in each half where a comparison of the halves holds, else 0."""
    name, *rest, source = instruction.modifiers
    if rest != ["f16x2"] or source != "f16x2":
        raise unsupported(instruction)
    compute = _comparison(instruction, name, "f16")

    def halved(a: Array, b: Array) -> Array:
        return compute(a.view(np.float16), b.view(np.float16)).astype(np.float16)

    def both(a: Array, b: Array) -> Array:
        (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
        return joined(halved(a_high, b_high), halved(a_low, b_low))

    return Operation((source, source), both)


OPERATIONS: dict[str, Callable[[Instruction], Operation]] = {
    "add": _both(2, np.add, np.add),
    "sub": _both(2, np.subtract, np.subtract),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    # `full` and `approx` may be off by two units: the nearest number is among what they may give
    "div": _both(2, _quotient, np.divide, known=(*ROUNDED, "full", "approx")),
    "rem": _both(2, _remainder, _remainder),
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "abs": _both(1, np.abs, np.abs),
    "neg": _both(1, np.negative, np.negative),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda values: 1 / np.sqrt(values)),
    "rcp": _unary(np.reciprocal),
    "ex2": _unary(np.exp2),
    "lg2": _unary(np.log2),
    "shl": _shift_left,
    "shr": _shift_right,
    "and": _logic(2, np.bitwise_and, np.logical_and),
    "or": _logic(2, np.bitwise_or, np.logical_or),
    "xor": _logic(2, np.bitwise_xor, np.logical_xor),
    "not": _logic(1, np.bitwise_not, np.logical_not),
    "bfe": _bfe,
    "bfi": _bfi,
    "popc": _popc,
    "clz": _clz,
    "lop3": _lop3,
    "prmt": _prmt,
    "selp": _selp,
    "setp": _setp,
    "set": _set,
}
