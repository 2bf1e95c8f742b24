"""Runs kernels: programs of a grid in a random order, some at a time, all their threads at once.

The code is cut at labels, branches and barriers. Of all threads that can go on, those at the
earliest piece do: so threads that parted meet again where their ways do, and loops of programs that
take more turns than others wait for nobody. A thread at a barrier waits for all of its program.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3_kernels.testing.ptx import matrix, transfers, warp
from m3_kernels.testing.ptx.arithmetic import OPERATIONS, Operation, unsupported
from m3_kernels.testing.ptx.conversion import conversion
from m3_kernels.testing.ptx.faults import Fault
from m3_kernels.testing.ptx.lanes import (
    WARP,
    Lanes,
    Read,
    Registers,
    Step,
    guard_of,
    reader,
    typed,
    writer,
)
from m3_kernels.testing.ptx.memory import GlobalMemory
from m3_kernels.testing.ptx.parse import Immediate, Instruction, Kernel, Vector
from m3_kernels.testing.ptx.shared import SharedMemory
from m3_kernels.testing.ptx.values import DTYPES, UNSIGNED, Array

# Threads at a time: numpy's own cost for a call is then small beside that of the work.
BATCH_THREADS = 4096
_ENDS = ("bra", "ret", "exit", "bar")


def _ends(instruction: Instruction) -> bool:
    """Whether threads may part or wait behind it."""
    return instruction.name in _ENDS and instruction.modifiers[:1] != ("warp",)


@dataclass(frozen=True)
class Piece:
    """Instructions that threads run one after another.

    Attributes
    ----------
    steps : of all but the last one, if that one is a branch, an end or a barrier
    counts : how often which instruction is among all of them, by name
    last : that one, or None; then the next piece follows
    guard : of the last one
    """

    steps: tuple[Step, ...]
    counts: Counter[str]
    last: Instruction | None
    guard: Read | None


@dataclass(frozen=True)
class Code:
    """A kernel made ready to run.

    Attributes
    ----------
    starts : piece of each label
    unit : bytes of the smallest access to shared memory
    """

    kernel: Kernel
    pieces: tuple[Piece, ...]
    starts: Mapping[str, int]
    unit: int


def prepare(kernel: Kernel) -> Code:
    """Make a kernel ready.

    Raises
    ------
    NotImplementedError : it has an instruction that is not known here
    """
    instructions = kernel.instructions
    cuts = {0, len(instructions), *kernel.labels.values()}
    cuts |= {one.number + 1 for one in instructions if _ends(one)}
    edges = sorted(cuts)
    pieces = tuple(_piece(instructions[first:last], kernel) for first, last in pairwise(edges))
    sizes = [transfers.access_bytes(one) for one in instructions]
    return Code(
        kernel=kernel,
        pieces=pieces,
        starts={label: edges.index(place) for label, place in kernel.labels.items()},
        unit=min([16, *(size for size in sizes if size is not None)]),
    )


def _piece(instructions: tuple[Instruction, ...], kernel: Kernel) -> Piece:
    last = instructions[-1] if instructions and _ends(instructions[-1]) else None
    body = instructions if last is None else instructions[:-1]
    if last is not None and last.name == "bar" and (last.guard or last.operands != (Immediate(0),)):
        raise unsupported(last)
    return Piece(
        steps=tuple(_step(one, kernel) for one in body),
        counts=Counter(_counted(one) for one in instructions),
        last=last,
        guard=guard_of(last.guard) if last is not None else None,
    )


def _counted(instruction: Instruction) -> str:
    """ "cp.async", "ld.shared", "mma.sync"."""
    return ".".join((instruction.name, *instruction.modifiers[:1]))


_BUILDERS: dict[str, Callable[[Instruction, Kernel], Step]] = {
    "ld": transfers.load,
    "st": transfers.store,
    "atom": transfers.atomic,
    "red": transfers.atomic,
    "cp": transfers.copy,
    "ldmatrix": matrix.load_matrices,
    "mma": matrix.product,
    "shfl": warp.shuffle,
    "redux": warp.reduction,
    "vote": warp.vote,
}
# Order of memory, within a warp or between programs: here everything happens in one order.
_NOTHING = ("membar", "fence", "bar")


def _step(instruction: Instruction, kernel: Kernel) -> Step:
    """What an instruction does."""
    name = instruction.name
    if name in _NOTHING:
        return lambda lanes: None
    if name in _BUILDERS:
        return _BUILDERS[name](instruction, kernel)
    if name == "mov":
        return _move(instruction, kernel)
    if name == "cvt":
        return _compute(conversion(instruction), instruction, kernel)
    if name in OPERATIONS:
        return _compute(OPERATIONS[name](instruction), instruction, kernel)
    raise unsupported(instruction)


def _compute(operation: Operation, instruction: Instruction, kernel: Kernel) -> Step:
    target, *sources = instruction.operands
    if len(sources) != len(operation.sources):
        raise unsupported(instruction)
    reads = [
        reader(source, type_, kernel)
        for source, type_ in zip(sources, operation.sources, strict=True)
    ]
    write, compute = writer(target, kernel, guard_of(instruction.guard)), operation.compute

    def step(lanes: Lanes) -> None:
        write(lanes, compute(*[read(lanes) for read in reads]))

    return step


def _move(instruction: Instruction, kernel: Kernel) -> Step:
    """`mov`; of a vector into the parts of a number, and back."""
    target, source = instruction.operands
    type_, guard = typed(instruction), guard_of(instruction.guard)
    if isinstance(target, Vector):
        return _unpack(target, reader(source, type_, kernel), kernel, guard)
    write = writer(target, kernel, guard)
    if isinstance(source, Vector):
        return _pack(source, DTYPES[type_].itemsize, kernel, write)
    read = reader(source, type_, kernel)
    return lambda lanes: write(lanes, read(lanes))


def _unpack(target: Vector, read: Read, kernel: Kernel, guard: Read | None) -> Step:
    writes = [writer(part, kernel, guard) for part in target.parts]

    def step(lanes: Lanes) -> None:
        whole = read(lanes)
        if np.ndim(whole) == 0:
            whole = lanes.spread(whole)
        parts = whole[:, None].view(UNSIGNED[whole.dtype.itemsize // len(writes)])
        for place, write in enumerate(writes):
            write(lanes, np.ascontiguousarray(parts[:, place]))

    return step


def _pack(source: Vector, size: int, kernel: Kernel, write: Callable[[Lanes, Array], None]) -> Step:
    part = size // len(source.parts)
    reads = [reader(one, f"u{8 * part}", kernel) for one in source.parts]

    def step(lanes: Lanes) -> None:
        parts = np.stack(np.broadcast_arrays(*(read(lanes) for read in reads)), axis=-1)
        write(lanes, parts.view(UNSIGNED[size])[..., 0])

    return step


def run(
    code: Code,
    *,
    grid: tuple[int, int, int],
    parameters: Mapping[str, Any],
    memory: GlobalMemory,
    shared: int,
    seed: int,
    batch_threads: int = BATCH_THREADS,
) -> Counter[str]:
    """Run a grid.

    Parameters
    ----------
    parameters : of the kernel by name, as scalars of their types
    shared : bytes of shared memory of dynamic size
    seed : of the order of programs, and of atomics at one address
    batch_threads : about how many threads run at a time

    Returns
    -------
    How often which instruction was run by a program, by name.

    Raises
    ------
    Fault : what a kernel must not do
    """
    kernel, counts = code.kernel, Counter[str]()
    chance = np.random.default_rng(seed)
    places = chance.permutation(math.prod(grid))
    size = max(1, batch_threads // kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(places), size):
            # x runs fastest
            z, y, x = np.unravel_index(places[first : first + size], grid[::-1])
            programs = np.stack([x, y, z], axis=1)
            lanes = _lanes(code, programs, grid, parameters, memory, shared, chance)
            counts += _Batch(code, lanes).run()
    return counts


def _lanes(
    code: Code,
    programs: NDArray[np.int64],
    grid: tuple[int, int, int],
    parameters: Mapping[str, Any],
    memory: GlobalMemory,
    shared: int,
    chance: np.random.Generator,
) -> Lanes:
    kernel = code.kernel
    count = len(programs) * kernel.threads
    registers = Registers(kernel.registers, count)
    thread = np.arange(count, dtype=np.uint32) % np.uint32(kernel.threads)
    registers |= {
        "%tid.x": thread,
        "%ntid.x": np.full(count, kernel.threads, np.uint32),
        "%laneid": thread % np.uint32(WARP),
        "%warpid": thread // np.uint32(WARP),
    }
    for axis, letter in enumerate("xyz"):
        column = programs[:, axis].astype(np.uint32)
        registers[f"%ctaid.{letter}"] = np.repeat(column, kernel.threads)
        registers[f"%nctaid.{letter}"] = np.full(count, grid[axis], np.uint32)
        if letter != "x":
            registers[f"%tid.{letter}"] = np.zeros(count, np.uint32)
            registers[f"%ntid.{letter}"] = np.ones(count, np.uint32)
    return Lanes(
        kernel=kernel,
        programs=programs,
        parameters=dict(parameters),
        memory=memory,
        shared=SharedMemory(
            programs=len(programs),
            threads=kernel.threads,
            size=kernel.shared_bytes + shared,
            unit=code.unit,
        ),
        chance=chance,
        registers=registers,
        active=np.ones(count, bool),
    )


class _Batch:
    """Where the threads of some programs are.

    Attributes
    ----------
    common : the piece that all threads are at, none of them waiting; None if they have parted
    piece, waiting, done : of each thread; of no meaning while there is a common piece
    """

    def __init__(self, code: Code, lanes: Lanes) -> None:
        self.code, self.lanes = code, lanes
        count = len(lanes.everyone)
        self.everyone = np.ones(count, bool)
        self.common: int | None = 0
        self.piece = np.zeros(count, np.int64)
        self.waiting = np.zeros(count, bool)
        self.done = np.zeros(count, bool)
        self.counts: Counter[int] = Counter()

    def run(self) -> Counter[str]:
        """To the end; as `run`."""
        pieces, lanes = self.code.pieces, self.lanes
        while (place := self._next()) is not None:
            self.counts[place] += self._programs()
            for step in pieces[place].steps:
                step(lanes)
            if not self._go_on_together(pieces[place]):
                self._go_on(pieces[place], place)
        if self.waiting.any():
            who = lanes.name(int(np.argmax(self.waiting)))
            raise Fault(f"{who} waits at a barrier that others of its program never reach")
        counts: Counter[str] = Counter()
        for place, often in self.counts.items():
            counts.update({name: often * n for name, n in pieces[place].counts.items()})
        return counts

    def _next(self) -> int | None:
        """The piece that is run next, and which threads run it; None at the end."""
        if self.common is not None:
            self.lanes.run_only(self.everyone, self.done)
            return self.common
        able = ~(self.waiting | self.done)
        if not able.any():
            return None
        place = int(self.piece[able].min())
        active = able & (self.piece == place)
        self.lanes.run_only(active, self.done)
        if active.all():
            self.common = place
        return place

    def _programs(self) -> int:
        """How many programs have threads that run."""
        if self.common is not None:
            return len(self.lanes.programs)
        return int(self.lanes.active.reshape(-1, self.code.kernel.threads).any(axis=1).sum())

    def _go_on_together(self, piece: Piece) -> bool:
        """To where a piece's last instruction sends all threads; False if they part or end."""
        if self.common is None:
            return False
        last, place, self.common = piece.last, self.common, None
        self.piece[:] = place
        following = place + 1
        if last is None or last.name == "bar":
            if last is not None:
                self.lanes.shared.barrier(np.ones(len(self.lanes.programs), bool))
        elif last.name == "bra":
            sent = self.everyone if piece.guard is None else piece.guard(self.lanes)
            if sent.any():
                if not sent.all():
                    return False
                following = self.code.starts[last.target]
        elif piece.guard is None or piece.guard(self.lanes).any():
            return False
        if following == len(self.code.pieces):
            return False
        self.common = following
        return True

    def _go_on(self, piece: Piece, place: int) -> None:
        """To where a piece's last instruction sends each thread that ran it."""
        last, active = piece.last, self.lanes.active
        self.piece[active] = place + 1
        if last is None:
            if place + 1 == len(self.code.pieces):
                self.done |= active
            return
        sent = active if piece.guard is None else active & piece.guard(self.lanes)
        if last.name == "bra":
            self.piece[sent] = self.code.starts[last.target]
        elif last.name == "bar":
            self.waiting |= sent
            self._release(place + 1)
        else:
            self.done |= sent

    def _release(self, place: int) -> None:
        """Let programs go on of which all threads have come to this barrier."""
        shape = (-1, self.code.kernel.threads)
        there = self.waiting & (self.piece == place) | self.done
        met = there.reshape(shape).all(axis=1) & self.waiting.reshape(shape).any(axis=1)
        if met.any():
            self.waiting &= ~np.repeat(met, shape[1])
            self.lanes.shared.barrier(met)
