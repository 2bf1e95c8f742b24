"""Instructions in which the 32 threads of a warp exchange values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3_kernels.testing.ptx.arithmetic import unsupported
from m3_kernels.testing.ptx.faults import Fault
from m3_kernels.testing.ptx.lanes import WARP, Lanes, Step, reader, typed, writer
from m3_kernels.testing.ptx.parse import Immediate, Instruction, Kernel, Operand, Vector
from m3_kernels.testing.ptx.values import Array

_EVERYONE = 0xFFFFFFFF
_LANE = np.arange(WARP, dtype=np.int64)


def require_whole_warps(lanes: Lanes, instruction: Instruction) -> None:
    """Fault unless all threads of each warp run together, or none."""
    if lanes.parted is not None:
        who = lanes.name(lanes.parted * WARP)
        raise Fault(f"{instruction} in the warp of {who}: some of its threads are elsewhere")


def _everyone(instruction: Instruction, mask: Operand, kernel: Kernel) -> Step:
    """Makes sure that whole warps take part, and no other: Triton writes no other masks."""
    if instruction.guard:
        raise unsupported(instruction)
    members = reader(mask, "b32", kernel)
    if isinstance(mask, Immediate) and mask.bits & _EVERYONE == _EVERYONE:
        return lambda lanes: require_whole_warps(lanes, instruction)

    def check(lanes: Lanes) -> None:
        require_whole_warps(lanes, instruction)
        named = np.broadcast_to(members(lanes), lanes.active.shape)
        if (named[lanes.active] != _EVERYONE).any():
            raise Fault(f"{instruction}: not all threads of a warp are named")

    return check


def by_warp(values: Any, lanes: Lanes) -> Array:
    """[warps, 32]; scalars spread out."""
    if np.ndim(values) == 0:
        values = np.full(len(lanes.everyone), values)
    return values.reshape(-1, WARP)


def shuffle_sources(
    mode: str, operand: NDArray[np.int64], limits: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The lane that each lane reads, and whether it is one of its segment; itself if not.

    Parameters
    ----------
    operand : lane, distance or mask, [..., 32]
    limits : the instruction's third operand: clamp in bits 0 to 4, mask of a segment in 8 to 12
    """
    clamp, segment = limits & 31, limits >> 8 & 31
    first = _LANE & segment
    last = first | clamp & ~segment
    operand = operand & 31
    if mode == "up":
        source = _LANE - operand
        valid = source >= last
    else:
        source = {
            "down": _LANE + operand,
            "bfly": _LANE ^ operand,
            "idx": first | operand & ~segment,
        }[mode]
        valid = source <= last
    return np.where(valid, source, _LANE), valid


def shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    """`shfl.sync`."""
    if instruction.modifiers[:1] != ("sync",) or typed(instruction) != "b32":
        raise unsupported(instruction)
    mode = instruction.modifiers[1]
    target, source, moved, limits, mask = instruction.operands
    check = _everyone(instruction, mask, kernel)
    if not isinstance(limits, Immediate):
        raise unsupported(instruction)
    read, amount = reader(source, "b32", kernel), reader(moved, "u32", kernel)
    targets = target.parts if isinstance(target, Vector) else (target,)
    writes = [writer(one, kernel) for one in targets]

    def step(lanes: Lanes) -> None:
        check(lanes)
        values = by_warp(read(lanes), lanes)
        distance = np.asarray(amount(lanes)).astype(np.int64)
        if distance.ndim == 0:
            sources, valid = shuffle_sources(mode, distance, limits.bits)
            results = values[:, sources], np.broadcast_to(valid, values.shape)
        else:
            sources, valid = shuffle_sources(mode, distance.reshape(-1, WARP), limits.bits)
            results = np.take_along_axis(values, sources, axis=1), valid
        for write, result in zip(writes, results, strict=False):
            write(lanes, result.reshape(-1))

    return step


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def reduction(instruction: Instruction, kernel: Kernel) -> Step:
    """`redux.sync`: of 32-bit integers."""
    sync, name, type_ = instruction.modifiers
    target, source, mask = instruction.operands
    check = _everyone(instruction, mask, kernel)
    if sync != "sync" or name not in _REDUCTIONS or type_ not in ("u32", "s32", "b32"):
        raise unsupported(instruction)
    read, write, reduce = reader(source, type_, kernel), writer(target, kernel), _REDUCTIONS[name]

    def step(lanes: Lanes) -> None:
        check(lanes)
        values = by_warp(read(lanes), lanes)
        write(lanes, np.repeat(reduce(values, axis=1, dtype=values.dtype), WARP))

    return step


def vote(instruction: Instruction, kernel: Kernel) -> Step:
    """`vote.sync`: any, all, or the ballot of a warp's predicates."""
    sync, name, _ = instruction.modifiers
    target, source, mask = instruction.operands
    check = _everyone(instruction, mask, kernel)
    if sync != "sync" or name not in ("any", "all", "ballot"):
        raise unsupported(instruction)
    read, write = reader(source, "pred", kernel), writer(target, kernel)

    def step(lanes: Lanes) -> None:
        check(lanes)
        votes = by_warp(read(lanes), lanes)
        if name == "ballot":
            found = (votes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=1)
            found = found.astype(np.uint32)
        else:
            found = votes.any(axis=1) if name == "any" else votes.all(axis=1)
        write(lanes, np.repeat(found, WARP))

    return step
