"""The threads of a batch of programs, and how instructions read and write their registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3_kernels.testing.ptx.memory import GlobalMemory
from m3_kernels.testing.ptx.parse import (
    Guard,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Sink,
    Symbol,
)
from m3_kernels.testing.ptx.shared import SharedMemory
from m3_kernels.testing.ptx.values import DTYPES, UNSIGNED, Array, constant, seen_as, widened

Mask = NDArray[np.bool_]
Read = Callable[["Lanes"], Any]
Write = Callable[["Lanes", Array], None]
Step = Callable[["Lanes"], None]

# Threads of a warp.
WARP = 32
# What a register holds that was never written.
UNWRITTEN = 0xA5


class Registers(dict[str, Array]):
    """Arrays over the threads by name; what was never written is garbage of its type."""

    def __init__(self, types: dict[str, str], count: int) -> None:
        self.types, self.count = types, count

    def __missing__(self, name: str) -> Array:
        dtype = DTYPES[self.types[name]]
        garbage = np.full(self.count * dtype.itemsize, UNWRITTEN, np.uint8)
        self[name] = garbage.view(dtype) if dtype.kind != "b" else garbage > 0
        return self[name]


@dataclass
class Lanes:
    """Threads of some programs, one behind another, and what they have.

    Attributes
    ----------
    kernel : that runs
    programs : place in the grid of each, int [programs, 3]
    parameters : of the kernel, as scalars
    chance : for what has no order
    active : threads that run now
    changes : where registers may change; None everywhere, where nobody misses what others hold
    running : the active ones by number
    parted : a warp of which some are active and some not; None if there is none
    """

    kernel: Kernel
    programs: NDArray[np.int64]
    parameters: dict[str, Any]
    memory: GlobalMemory
    shared: SharedMemory
    chance: np.random.Generator
    registers: Registers
    active: Mask
    changes: Mask | None = None
    constants: dict[tuple[str, bytes], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.everyone = self.running = np.arange(len(self.active))
        self.parted: int | None = None

    def run_only(self, active: Mask, done: Mask) -> None:
        """Let these threads run from now on; those that have ended no longer need registers."""
        self.active = active
        if active.all():
            self.changes, self.running, self.parted = None, self.everyone, None
            return
        self.changes = None if (active | done).all() else active
        self.running = np.flatnonzero(active)
        together = active.reshape(-1, WARP)
        parted = together.any(axis=1) & ~together.all(axis=1)
        self.parted = int(np.argmax(parted)) if parted.any() else None

    def spread(self, scalar: Any) -> Array:
        """A scalar for all threads; nobody changes registers in place, so it is made once."""
        key = (scalar.dtype.char, scalar.tobytes())
        if key not in self.constants:
            self.constants[key] = np.full(len(self.active), scalar)
        return self.constants[key]

    def name(self, thread: int) -> str:
        """A thread of the batch in words."""
        program, place = divmod(thread, self.kernel.threads)
        x, y, z = self.programs[program].tolist()
        return f"thread {place} of program ({x}, {y}, {z})"


def reader(operand: Operand, type_: str, kernel: Kernel) -> Read:
    """What gives an operand as an array over the threads, or as a scalar, in a type."""
    dtype = DTYPES[type_]
    if isinstance(operand, Immediate):
        scalar = constant(operand, dtype)
        return lambda lanes: scalar
    if isinstance(operand, Symbol):
        address = dtype.type(kernel.shared[operand.name])
        return lambda lanes: address
    if not isinstance(operand, Register):
        raise ValueError(f"{operand} cannot be read as {type_}")
    name = operand.name

    def read(lanes: Lanes) -> Array:
        values = lanes.registers[name]
        return values if values.dtype is dtype else seen_as(values, dtype)

    return read


def writer(operand: Operand, kernel: Kernel, guard: Read | None = None) -> Write:
    """What puts values of all threads into a register, for those that run."""
    if isinstance(operand, Sink):
        return lambda lanes, values: None
    if not isinstance(operand, Register):
        raise ValueError(f"{operand} cannot be written")
    name, size = operand.name, DTYPES[kernel.registers[operand.name]].itemsize

    def write(lanes: Lanes, values: Array) -> None:
        if values.dtype.itemsize != size:
            values = widened(values, size)
        if values.ndim == 0:
            values = lanes.spread(values)
        change = lanes.changes
        if guard is not None:
            change = guard(lanes) if change is None else guard(lanes) & change
        if change is not None:
            values = np.where(change, values, seen_as(lanes.registers[name], values.dtype))
        lanes.registers[name] = values

    return write


def guard_of(guard: Guard | None) -> Read | None:
    """Which threads an instruction's guard lets run."""
    if guard is None:
        return None
    name = guard.register.name
    if guard.negated:
        return lambda lanes: ~lanes.registers[name]
    return lambda lanes: lanes.registers[name]


def chosen(lanes: Lanes, guard: Read | None) -> NDArray[np.int64]:
    """The threads that run an instruction, by number."""
    if guard is not None:
        return np.flatnonzero(lanes.active & guard(lanes))
    return lanes.running


def at(values: Any, threads: NDArray[np.int64]) -> Array:
    """Values of some threads, of scalars too."""
    if np.ndim(values) == 0:
        return np.full(len(threads), values)
    return values[threads]


def scattered(values: Array, threads: NDArray[np.int64], count: int) -> Array:
    """Values of some threads among zeros for all others."""
    if len(threads) == count:
        return values
    found = np.zeros(count, values.dtype)
    found[threads] = values
    return found


def typed(instruction: Instruction) -> str:
    """The type at an instruction's end."""
    return instruction.modifiers[-1]


def bits(type_: str) -> np.dtype[Any]:
    """Unsigned integers of a type's size."""
    return UNSIGNED[DTYPES[type_].itemsize]
