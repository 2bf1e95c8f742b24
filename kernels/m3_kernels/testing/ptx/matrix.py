"""Tensor cores: `mma.sync`, and `ldmatrix`, which loads what they take.

Fragments lie as "Matrix fragments for mma" of the PTX ISA has it. With g = lane / 4, t = lane % 4
and n numbers to a register, register r of the left matrix holds row g + 8 (r % 2) and columns
n t to n t + n - 1, plus 4 n for r >= 2; register r of the right one column g and rows n t to
n t + n - 1, plus 4 n for r = 1; that of the sum row g + 8 (r / 2) and column 2 t + r % 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3_kernels.testing.ptx.arithmetic import unsupported
from m3_kernels.testing.ptx.faults import Fault
from m3_kernels.testing.ptx.lanes import WARP, Lanes, Read, Step, reader, writer
from m3_kernels.testing.ptx.parse import Address, Instruction, Kernel, Vector
from m3_kernels.testing.ptx.shared import Access, Conflict
from m3_kernels.testing.ptx.values import Array, of_bf16, of_fp8
from m3_kernels.testing.ptx.warp import by_warp, require_whole_warps

_SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


def _numbers(registers: Array, type_: str) -> Array:
    """Registers [..., 1] of 32 bits as float64 [..., numbers]."""
    if type_ == "f16":
        return registers.view(np.float16).astype(np.float64)
    if type_ == "bf16":
        return of_bf16(registers.view(np.uint16)).astype(np.float64)
    if type_ == "tf32":
        # the hardware leaves the low 13 bits out
        return (registers & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type_ in ("s8", "u8"):
        return registers.view(np.int8 if type_ == "s8" else np.uint8).astype(np.float64)
    return of_fp8(registers.view(np.uint8), type_).astype(np.float64)


def left(registers: Sequence[Array], type_: str) -> Array:
    """The left matrix [warps, 16, k] in float64 from registers [warps, 32]."""
    # [column half, row half, warp, g, t, number]
    parts = _numbers(np.stack(registers)[..., None], type_)
    parts = parts.reshape(len(registers) // 2, 2, -1, 8, 4, parts.shape[-1])
    warps = parts.shape[2]
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)


def right(registers: Sequence[Array], type_: str) -> Array:
    """The right matrix [warps, k, 8] in float64 from registers [warps, 32]."""
    # [row half, warp, g, t, number]
    parts = _numbers(np.stack(registers)[..., None], type_)
    parts = parts.reshape(len(registers), -1, 8, 4, parts.shape[-1])
    warps = parts.shape[1]
    return parts.transpose(1, 2, 0, 3, 4).reshape(warps, 8, -1).transpose(0, 2, 1)


def summed(registers: Sequence[Array]) -> Array:
    """The matrix [warps, 16, 8] that is added to, from four registers [warps, 32]."""
    # [row half, column, warp, g, t]
    parts = np.stack(registers).reshape(2, 2, -1, 8, 4)
    return parts.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def fragments(matrix: Array) -> list[Array]:
    """Four registers [warps, 32] that hold a matrix [warps, 16, 8]."""
    parts = matrix.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(np.ascontiguousarray(parts).reshape(4, -1, WARP))


def product(instruction: Instruction, kernel: Kernel) -> Step:
    """`mma.sync`: exact products of numbers, added up in float64 and rounded once.

    Tensor cores keep fewer bits of a sum than float64 and more than float32.
    """
    modifiers = instruction.modifiers
    shape = re.fullmatch(r"m16n8k(\d+)", modifiers[2]) if len(modifiers) == 9 else None
    layouts = (*modifiers[:2], *modifiers[3:5])
    if shape is None or layouts != ("sync", "aligned", "row", "col") or instruction.guard:
        raise unsupported(instruction)
    result, left_type, right_type, _ = modifiers[5:]
    integers = result == "s32"
    if result not in ("f32", "s32") or left_type not in _SIZES or right_type not in _SIZES:
        raise unsupported(instruction)
    target, *sources = instruction.operands
    if not all(isinstance(one, Vector) for one in (target, *sources)):
        raise unsupported(instruction)
    reads: list[list[Read]] = [
        [reader(part, type_, kernel) for part in one.parts]
        for one, type_ in zip(sources, ("b32", "b32", result), strict=True)
        if isinstance(one, Vector)
    ]
    columns = int(shape[1])
    if [len(one) for one in reads] != [
        16 * columns * _SIZES[left_type] // 4 // WARP,
        8 * columns * _SIZES[right_type] // 4 // WARP,
        4,
    ]:
        raise unsupported(instruction)
    parts = target.parts if isinstance(target, Vector) else ()
    writes = [writer(part, kernel) for part in parts]
    dtype: Any = np.int32 if integers else np.float32

    def step(lanes: Lanes) -> None:
        require_whole_warps(lanes, instruction)
        a, b, c = ([by_warp(read(lanes), lanes) for read in one] for one in reads)
        total = left(a, left_type) @ right(b, right_type) + summed(c)
        if integers:
            total = total.astype(np.int64)
        for write, part in zip(writes, fragments(total.astype(dtype)), strict=True):
            write(lanes, part.reshape(-1))

    return step


def load_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    """`ldmatrix`: 8 x 8 matrices of 16-bit numbers; lanes 8 i to 8 i + 7 point to rows of one."""
    modifiers = instruction.modifiers
    count = {"x1": 1, "x2": 2, "x4": 4}.get(modifiers[3] if len(modifiers) > 3 else "", 0)
    transposed = "trans" in modifiers
    rest = ("trans",) * transposed
    if not count or instruction.guard or modifiers[:3] != ("sync", "aligned", "m8n8"):
        raise unsupported(instruction)
    if modifiers[4:] not in ((*rest, "shared", "b16"), (*rest, "shared::cta", "b16")):
        raise unsupported(instruction)
    target, source = instruction.operands
    if not isinstance(source, Address) or not isinstance(target, Vector):
        raise unsupported(instruction)
    base, offset = reader(source.base, "u32", kernel), source.offset
    writes = [writer(part, kernel) for part in target.parts]

    def step(lanes: Lanes) -> None:
        require_whole_warps(lanes, instruction)
        warps = np.flatnonzero(lanes.active.reshape(-1, WARP)[:, 0])
        addresses = by_warp(base(lanes), lanes)[warps, : 8 * count].astype(np.int64) + offset
        threads = warps[:, None] * WARP + np.arange(8 * count)
        access = Access(instruction.number, threads.reshape(-1), addresses.reshape(-1), 16)
        try:
            rows = lanes.shared.read(access, 8, np.dtype(np.uint16))
        except Conflict as error:
            other = "" if error.other is None else f" {kernel.instructions[error.other]}"
            who = lanes.name(int(access.threads[error.place]))
            raise Fault(
                f"{instruction} of {who}: shared byte {error.byte}, {error.why}{other}"
            ) from None
        matrices = rows.reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, WARP)
        for number, write in enumerate(writes):
            found = np.zeros((len(lanes.everyone) // WARP, WARP), np.uint32)
            found[warps] = words[:, number]
            write(lanes, found.reshape(-1))

    return step
