"""Instructions that touch memory: loads, stores, atomics, asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3_kernels.testing.ptx.arithmetic import unsupported
from m3_kernels.testing.ptx.faults import Fault
from m3_kernels.testing.ptx.lanes import (
    Lanes,
    Read,
    Step,
    at,
    bits,
    chosen,
    guard_of,
    reader,
    scattered,
    typed,
    writer,
)
from m3_kernels.testing.ptx.memory import OutOfBounds
from m3_kernels.testing.ptx.parse import Address, Immediate, Instruction, Kernel, Operand, Vector
from m3_kernels.testing.ptx.shared import Access, Conflict
from m3_kernels.testing.ptx.values import DTYPES, Array, seen_as

Integers = NDArray[np.int64]
Group = int | None

# What chips of sm_80 and sm_89 make no difference of: caches, and hints for them.
_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "relaxed", "weak", "gpu")
_HINTS += ("L1::evict_last", "L1::evict_first", "L1::no_allocate", "cta", "sys")
_SHARED = ("shared", "shared::cta")


def space_of(instruction: Instruction) -> str:
    """ "global", "shared", "param", or "" for what has none."""
    for modifier in instruction.modifiers:
        if modifier in _SHARED:
            return "shared"
        if modifier in ("global", "param"):
            return modifier
    return ""


def _count(instruction: Instruction) -> int:
    """Numbers of a vector."""
    vectors = {"v2": 2, "v4": 4, "v8": 8}
    known = (*_HINTS, *_SHARED, "global", "param", *vectors)
    if any(one not in known for one in instruction.modifiers[:-1]):
        raise unsupported(instruction)
    return next((vectors[one] for one in instruction.modifiers if one in vectors), 1)


def access_bytes(instruction: Instruction) -> int | None:
    """What a thread of an instruction touches in shared memory at a time; None if nothing."""
    if space_of(instruction) != "shared":
        return None
    if instruction.name == "cp":
        return _copied(instruction)
    if instruction.name == "ldmatrix":
        return 16
    if instruction.name in ("ld", "st"):
        return _count(instruction) * DTYPES[typed(instruction)].itemsize
    return DTYPES[typed(instruction)].itemsize


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _addresses(operand: Operand, space: str, kernel: Kernel) -> Read:
    """Addresses as signed 64-bit numbers, which no address is too large for."""
    if not isinstance(operand, Address):
        raise ValueError(f"{operand} is no address")
    base = reader(operand.base, "u32" if space == "shared" else "u64", kernel)
    return lambda lanes: np.asarray(base(lanes)).astype(np.int64) + operand.offset


def _out_of_bounds(
    instruction: Instruction, lanes: Lanes, threads: Integers, where: Integers, error: OutOfBounds
) -> Fault:
    who = lanes.name(int(threads[error.place]))
    return Fault(f"{instruction} of {who}: address {where[error.place]:#x}, {error.why}")


def _conflict(instruction: Instruction, lanes: Lanes, access: Access, error: Conflict) -> Fault:
    who = lanes.name(int(access.threads[error.place]))
    other = "" if error.other is None else f" {lanes.kernel.instructions[error.other]}"
    return Fault(f"{instruction} of {who}: shared byte {error.byte}, {error.why}{other}")


def load(instruction: Instruction, kernel: Kernel) -> Step:
    """`ld`; signed numbers keep their sign in wider registers."""
    space, count = space_of(instruction), _count(instruction)
    if space == "param":
        return _load_parameter(instruction, kernel)
    if space not in ("global", "shared"):
        raise unsupported(instruction)
    target, source = instruction.operands
    dtype, guard = DTYPES[typed(instruction)], guard_of(instruction.guard)
    addresses = _addresses(source, space, kernel)
    writes = [writer(part, kernel, guard) for part in _parts(target)]

    def step(lanes: Lanes) -> None:
        threads = chosen(lanes, guard)
        if not len(threads):
            return
        where = at(addresses(lanes), threads)
        if space == "global":
            try:
                found = lanes.memory.read(where, count, dtype)
            except OutOfBounds as error:
                raise _out_of_bounds(instruction, lanes, threads, where, error) from None
        else:
            access = Access(instruction.number, threads, where, count * dtype.itemsize)
            try:
                found = lanes.shared.read(access, count, dtype)
            except Conflict as error:
                raise _conflict(instruction, lanes, access, error) from None
        for place, write in enumerate(writes):
            column = np.ascontiguousarray(found[:, place])
            write(lanes, scattered(column, threads, len(lanes.everyone)))

    return step


def _load_parameter(instruction: Instruction, kernel: Kernel) -> Step:
    target, source = instruction.operands
    if not isinstance(source, Address) or source.offset or isinstance(source.base, Immediate):
        raise unsupported(instruction)
    name, dtype = source.base.name, DTYPES[typed(instruction)]
    write = writer(target, kernel, guard_of(instruction.guard))

    def step(lanes: Lanes) -> None:
        write(lanes, seen_as(np.asarray(lanes.parameters[name]), dtype)[()])

    return step


def store(instruction: Instruction, kernel: Kernel) -> Step:
    """`st`."""
    space, count = space_of(instruction), _count(instruction)
    if space not in ("global", "shared"):
        raise unsupported(instruction)
    target, source = instruction.operands
    dtype, guard = bits(typed(instruction)), guard_of(instruction.guard)
    addresses = _addresses(target, space, kernel)
    # registers may be wider than what is stored of them
    reads = [reader(part, f"u{8 * dtype.itemsize}", kernel) for part in _parts(source)]

    def step(lanes: Lanes) -> None:
        threads = chosen(lanes, guard)
        if not len(threads):
            return
        where = at(addresses(lanes), threads)
        values = np.stack([at(read(lanes), threads) for read in reads], axis=1)
        if space == "global":
            try:
                lanes.memory.write(where, values)
            except OutOfBounds as error:
                raise _out_of_bounds(instruction, lanes, threads, where, error) from None
            return
        access = Access(instruction.number, threads, where, count * dtype.itemsize)
        try:
            lanes.shared.write(access, values)
        except Conflict as error:
            raise _conflict(instruction, lanes, access, error) from None

    return step


_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "exch": lambda old, new: new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
}
_ORDERS = ("relaxed", "acquire", "release", "acq_rel")


def atomic(instruction: Instruction, kernel: Kernel) -> Step:
    """`atom` and `red` in global memory, one thread after another in a random order."""
    *modifiers, type_ = instruction.modifiers
    names = [one for one in modifiers if one in _ATOMIC]
    known = ("global", "gpu", "cta", "sys", *_ORDERS, *_ATOMIC)
    if any(one not in known for one in modifiers) or not names or type_ in ("f16", "bf16"):
        raise unsupported(instruction)
    if space_of(instruction) != "global":
        raise unsupported(instruction)
    combine, guard = _ATOMIC[names[0]], guard_of(instruction.guard)
    *targets, target, source = instruction.operands
    addresses, read = _addresses(target, "global", kernel), reader(source, type_, kernel)
    writes = [writer(one, kernel, guard) for one in targets]

    def step(lanes: Lanes) -> None:
        threads = chosen(lanes, guard)
        if not len(threads):
            return
        where, values = at(addresses(lanes), threads), at(read(lanes), threads)
        order = lanes.chance.permutation(len(threads))
        try:
            found = lanes.memory.change(
                where, DTYPES[type_], lambda old, place: combine(old, values[place]), order
            )
        except OutOfBounds as error:
            raise _out_of_bounds(instruction, lanes, threads, where, error) from None
        for write in writes:
            write(lanes, scattered(found, threads, len(lanes.everyone)))

    return step


def _copied(instruction: Instruction) -> int:
    """Bytes of one asynchronous copy."""
    size = instruction.operands[2]
    if not isinstance(size, Immediate) or instruction.modifiers[0] != "async":
        raise unsupported(instruction)
    return size.bits


def copy(instruction: Instruction, kernel: Kernel) -> Step:
    """`cp.async`: what it does not read of its size are zeros; groups, and waiting for them."""
    modifiers = instruction.modifiers
    if modifiers == ("async", "commit_group"):
        return lambda lanes: lanes.shared.commit(chosen(lanes, None))
    if modifiers in (("async", "wait_group"), ("async", "wait_all")):
        return _wait(instruction)
    if modifiers[:1] != ("async",) or modifiers[2:4] not in (
        ("shared", "global"),
        ("shared::cta", "global"),
    ):
        raise unsupported(instruction)
    target, source, _, *counted = instruction.operands
    size, guard = _copied(instruction), guard_of(instruction.guard)
    to, from_ = _addresses(target, "shared", kernel), _addresses(source, "global", kernel)
    read = reader(counted[0] if counted else Immediate(size), "u32", kernel)

    def step(lanes: Lanes) -> None:
        threads = chosen(lanes, guard)
        if not len(threads):
            return
        counts, where = at(read(lanes), threads), at(from_(lanes), threads)
        data = np.zeros((len(threads), size), np.uint8)
        for count in np.unique(counts).tolist():
            some = np.flatnonzero(counts == count)
            if count:
                try:
                    data[some, :count] = _bytes(lanes, where[some], count, size)
                except OutOfBounds as error:
                    place = OutOfBounds(int(some[error.place]), error.why)
                    raise _out_of_bounds(instruction, lanes, threads, where, place) from None
        access = Access(instruction.number, threads, at(to(lanes), threads), size)
        try:
            lanes.shared.start_copies(access, data)
        except Conflict as error:
            raise _conflict(instruction, lanes, access, error) from None

    return step


def _bytes(lanes: Lanes, where: Integers, count: int, size: int) -> Array:
    """`count` bytes from each address, all of which are multiples of the size of the copy."""
    if (where % size).any():
        raise OutOfBounds(int(np.argmax(where % size != 0)), f"not a multiple of {size}")
    whole = lanes.memory.read(where, 1, np.dtype(f"V{count}")) if count == size else None
    if whole is not None:
        return whole.view(np.uint8).reshape(len(where), count)
    return np.concatenate(
        [lanes.memory.read(where + byte, 1, np.dtype(np.uint8)) for byte in range(count)], axis=1
    )


def _wait(instruction: Instruction) -> Step:
    pending: Group = None
    if instruction.operands:
        (allowed,) = instruction.operands
        if not isinstance(allowed, Immediate):
            raise unsupported(instruction)
        pending = allowed.bits

    def step(lanes: Lanes) -> None:
        try:
            lanes.shared.wait(lanes.active, pending)
        except Conflict as error:
            raise Fault(f"{instruction}: shared byte {error.byte}, {error.why}") from None

    return step
