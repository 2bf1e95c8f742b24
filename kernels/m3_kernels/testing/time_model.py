"""How long a launch should take on a chip that is not here: a model from machine code and bytes.

A program is a way to its hot loop, turns of it, and a way out, in cycles as `sass.py` reads them. A
turn is longer where the programs on a multiprocessor want more of one of its units than it has. A
launch is at least as long as its slowest program, its waves of programs, and its bytes.

Nothing here was held against a GPU. Expect absolute times to be off by a quarter; ratios of two
kernels come out of the same assumptions and should be better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3_kernels.testing.compile_gate import Compiled

ERROR = 0.25


@dataclass(frozen=True)
class Chip:
    """A GPU as its vendor describes it.

    Attributes
    ----------
    arch : compute capability as major * 10 + minor
    clock : cycles per microsecond under load
    memory, l2 : bytes per microsecond that a kernel reaches, nine tenths of the memory's peak
    operations : dense 16-bit multiplications and additions of a multiprocessor per cycle
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    memory: float
    l2: float
    operations: int

    @property
    def throughput(self) -> float:
        """Operations per microsecond of all tensor cores."""
        return self.multiprocessors * self.operations * self.clock


CHIPS = {
    "H100": Chip("H100", 90, 132, 1.9e3, 3.0e6, 5.5e6, 4096),
    "H200": Chip("H200", 90, 132, 1.9e3, 4.3e6, 5.5e6, 4096),
}

# Cycles until memory answers a program's first load of data that no cache holds.
FIRST_BYTES = 900
# Share of the issue slots of a multiprocessor, one instruction per quarter and cycle, that is used.
ISSUED = 0.85
# Lanes of the conversion unit of a multiprocessor.
CONVERSION_LANES = 16
# From one launch of a chain to the next, microseconds: dependent, and in the ordinary way.
GAP_DEPENDENT, GAP_ORDINARY = 0.7, 1.2


@dataclass(frozen=True)
class Work:
    """What a launch has to do.

    Attributes
    ----------
    programs : those that work
    turns : of the hot loop, in each of them
    operations : of the products of a turn, each counted once
    fold_turns : turns of the last loop without products, in the program that ends last: a merge
    awaited : times that a program waits for memory and nothing else runs, after its first
    bytes_moved : of device memory
    l2_bytes : between caches and multiprocessors, where that is more
    """

    programs: int
    turns: float = 0
    operations: int = 0
    fold_turns: int = 0
    awaited: int = 0
    bytes_moved: int = 0
    l2_bytes: int = 0


def microseconds(chip: Chip, compiled: Compiled, work: Work) -> float:
    """Time of a launch from the end of the one before it."""
    at_once = max(1, compiled.programs_per_sm(chip.arch))
    resident = min(at_once, math.ceil(work.programs / chip.multiprocessors))
    waves = work.programs / (chip.multiprocessors * at_once)
    timeline = compiled.timeline
    path = timeline.before + timeline.after + (1 + work.awaited) * FIRST_BYTES
    if timeline.hot >= 0:
        path += work.turns * turn(chip, compiled, work.operations, resident)
    path *= max(1, math.ceil(waves) if waves < 4 else waves)
    path += work.fold_turns * _fold_period(compiled)
    memory = work.bytes_moved / chip.memory + (timeline.before + FIRST_BYTES) / chip.clock
    gap = GAP_DEPENDENT if compiled.dependency else GAP_ORDINARY
    return gap + max(path / chip.clock, memory, work.l2_bytes / chip.l2)


def turn(chip: Chip, compiled: Compiled, operations: int, resident: int) -> float:
    """Cycles of a turn of the hot loop while so many programs share a multiprocessor.

    A program waits for its products; only another program's work can hide that.
    """
    loop = compiled.timeline.loops[compiled.timeline.hot]
    lanes = 32 * compiled.warps * resident
    products = operations * compiled.duplicates / chip.operations
    return max(
        loop.period + products,
        lanes * loop.instructions / 128 / ISSUED,
        lanes * loop.conversions / CONVERSION_LANES,
        products * resident,
    )


def _fold_period(compiled: Compiled) -> int:
    """Cycles of the last loop that multiplies nothing and waits for loads; 0 without one."""
    folds = [
        loop.period for loop in compiled.timeline.loops if not loop.products and loop.awaited_loads
    ]
    return folds[-1] if folds else 0
