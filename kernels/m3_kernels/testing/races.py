"""Looks for races between programs and for accesses out of bounds, in Triton's interpreter.

The interpreter runs the programs of a launch one after the other, in the order of the grid, so a
kernel that lacks an order passes its tests. Here they run in a random order, and every byte they
touch remembers who wrote it, who read it and who changed it atomically. Two programs that touch a
byte, one of them to write it, must be ordered by atomics that acquire and release: program order
and nothing else makes one happen before the other (vector clocks). A race is found although nothing
runs at the same time.

Of several readers of a byte the last is remembered, so which of them a later write races with
depends on the seed. Threads of one program are not told apart, and what the hardware reorders
within one is not seen.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass
class Watch:
    """What was seen.

    Attributes
    ----------
    faults : how many bytes each fault concerns; a fault is a sentence with the kernel and the line
    bytes_seen : touched by each kernel
    """

    faults: Counter[str] = field(default_factory=Counter)
    bytes_seen: Counter[str] = field(default_factory=Counter)


class Touched:
    """For each byte of the arguments: the program that touched it last, and its clock then."""

    def __init__(self, size: int) -> None:
        # 0 is nobody: programs count from 1
        self.program = np.zeros(size, np.int32)
        self.clock = np.zeros(size, np.int32)

    def unordered(self, places: Integers, known: NDArray[np.int32]) -> int:
        """How many of the bytes were touched by what did not happen before."""
        return int(np.count_nonzero(known[self.program[places]] < self.clock[places]))

    def note(self, places: Integers, program: int, clock: int) -> None:
        """This program has touched them."""
        self.program[places] = program
        self.clock[places] = clock


class Launched:
    """The memory and the clocks of one launch."""

    def __init__(self, kernel: str, extents: list[tuple[int, int]], watch: Watch) -> None:
        self.kernel, self.watch = kernel, watch
        merged = _merged(extents)
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.ends = np.array([end for _, end in merged], np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        size = int(self.offsets[-1])
        self.written, self.read, self.changed = Touched(size), Touched(size), Touched(size)
        self.order: list[tuple[int, int, int]] = []
        self.program = 0
        self.clocks = np.zeros(1, np.int32)
        self.known: dict[int, NDArray[np.int32]] = {}
        self.released: dict[int, NDArray[np.int32]] = {}

    def begin(self, grid: tuple[int, int, int], chance: random.Random) -> None:
        """Before the first program."""
        width, height, depth = grid
        self.order = list(product(range(width), range(height), range(depth)))
        chance.shuffle(self.order)
        self.clocks = np.ones(len(self.order) + 1, np.int32)

    def next_program(self) -> tuple[int, int, int]:
        """Where in the grid the program is that runs next."""
        self.program += 1
        known = np.zeros(len(self.clocks), np.int32)
        known[self.program] = np.iinfo(np.int32).max
        self.known[self.program] = known
        return self.order[self.program - 1]

    def load(self, addresses: Integers, size: int) -> None:
        """The running program reads numbers of so many bytes."""
        places = self._places(addresses, size, "read")
        self._race("reads what another program writes", places, self.written, self.changed)
        self.read.note(places, self.program, int(self.clocks[self.program]))

    def store(self, addresses: Integers, size: int) -> None:
        """It writes them."""
        if len(np.unique(addresses)) < len(addresses):
            self._fault("writes one address from two lanes", 1)
        places = self._places(addresses, size, "write")
        self._race("writes what another program writes", places, self.written, self.changed)
        self._race("writes what another program reads", places, self.read)
        self.written.note(places, self.program, int(self.clocks[self.program]))

    def change(self, addresses: Integers, size: int, *, acquires: bool, releases: bool) -> None:
        """It changes them atomically."""
        known = self.known[self.program]
        for address in addresses.tolist():
            others = self.released.get(address)
            if acquires and others is not None:
                np.maximum(known, others, out=known)
        places = self._places(addresses, size, "change")
        self._race("changes what another program writes", places, self.written)
        self._race("changes what another program reads", places, self.read)
        clock = int(self.clocks[self.program])
        self.changed.note(places, self.program, clock)
        if releases:
            mine = known.copy()
            mine[self.program] = clock
            self.released |= dict.fromkeys(addresses.tolist(), mine)
            self.clocks[self.program] += 1

    def _places(self, addresses: Integers, size: int, what: str) -> Integers:
        """Numbers of the bytes; those out of bounds are a fault and left out."""
        found = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (found >= 0) & (addresses + size <= self.ends[found])
        if not inside.all():
            self._fault(f"would {what} beyond its arguments", int(np.count_nonzero(~inside)))
        found, addresses = found[inside], addresses[inside]
        first = addresses - self.starts[found] + self.offsets[found]
        places = (first[:, None] + np.arange(size)).ravel()
        self.watch.bytes_seen[self.kernel] += len(places)
        return places

    def _race(self, what: str, places: Integers, *others: Touched) -> None:
        known = self.known[self.program]
        if count := sum(other.unordered(places, known) for other in others):
            self._fault(what, count)

    def _fault(self, what: str, count: int) -> None:
        self.watch.faults[f"{self.kernel} {what}, {_line()}"] += count


@contextmanager
def watched(seed: int) -> Iterator[Watch]:
    """Within `interpreted()`: launches run in random order, and what they touch is watched.

    Memory of a launch is what its tensor arguments span, first to last number; what lies beyond,
    in the same storage too, is out of bounds.

    Parameters
    ----------
    seed : of the order of the programs
    """
    from triton.runtime import interpreter

    chance, watch = random.Random(seed), Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    to_host, set_dim, set_index = (
        executor._init_args_hst,
        builder.set_grid_dim,
        builder.set_grid_idx,
    )
    load, store, change = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    now: list[Launched] = []

    def launch(self: Any, arguments: Any, named: Any) -> Any:
        found = to_host(self, arguments, named)
        now[:] = [
            Launched(self.fn.__name__, list(_extents((*found[0], *found[1].values()))), watch)
        ]
        return found

    def begin(self: Any, *grid: int) -> None:
        now[0].begin((grid[0], grid[1], grid[2]), chance)
        set_dim(self, *grid)

    def next_program(self: Any, *_: int) -> None:
        set_index(self, *now[0].next_program())

    def masked_load(self: Any, places: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        now[0].load(_addresses(places, mask), _size(places))
        return load(self, places, mask, *rest, **named)

    def masked_store(self: Any, places: Any, value: Any, mask: Any, *rest: Any) -> Any:
        now[0].store(_addresses(places, mask), _size(places))
        return store(self, places, value, mask, *rest)

    def atomic(self: Any, op: Any, places: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        order = str(sem).lower()
        both = "acquire_release" in order or "acq_rel" in order
        now[0].change(
            _addresses(places, mask),
            _size(places),
            acquires=both or "acquire" in order,
            releases=both or "release" in order,
        )
        return change(self, op, places, value, mask, sem, scope)

    def unknown(*_: Any) -> None:
        raise NotImplementedError("races.watched: atomic_cas is not watched; teach it to")

    with (
        mock.patch.object(executor, "_init_args_hst", launch),
        mock.patch.multiple(
            builder,
            set_grid_dim=begin,
            set_grid_idx=next_program,
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=atomic,
            create_atomic_cas=unknown,
        ),
    ):
        yield watch


def _addresses(places: Any, mask: Any) -> Integers:
    addresses = np.asarray(places.data).astype(np.int64)
    if mask is None:
        return addresses.ravel()
    return addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]


def _size(places: Any) -> int:
    """Bytes of what a tensor of pointers points to."""
    return max(1, places.get_element_ty().primitive_bitwidth // 8)


def _extents(arguments: tuple[Any, ...]) -> Iterator[tuple[int, int]]:
    """First byte of each tensor, and the one after its last."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _extents(argument)
        elif hasattr(argument, "block_shape"):
            yield from _extents((argument.base,))
        elif hasattr(argument, "data_ptr"):
            # Triton's own wrapper of a tensor of another dtype holds it as its base
            tensor = getattr(argument, "base", argument)
            if tensor.numel():
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                yield start, start + (last + 1) * tensor.element_size()


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same memory in pieces that neither meet nor overlap."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(extents):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found or [(0, 0)]


def _line() -> str:
    """Where in the source of a kernel the running access stands."""
    import triton

    frame: FrameType | None = sys._getframe()
    passed = (__file__, str(Path(triton.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(passed):
        frame = frame.f_back
    if frame is None:
        return "in no known line"
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name}:{frame.f_lineno}"
