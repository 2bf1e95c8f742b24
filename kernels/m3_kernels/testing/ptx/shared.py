"""Shared memory of programs, and the watch over what their warps do to it.

Two accesses of different warps to the same byte, one of them a write, need a barrier of the program
between them. Asynchronous copies are in flight from their start until a thread waits for its own;
until then nobody may touch the bytes they go to.

The watch remembers per unit who wrote it last and when each warp last read it. A unit is as large
as the smallest access of the kernel: since every access is aligned to its size, none touches a part
of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3_kernels.testing.ptx.values import Array

Integers = NDArray[np.int64]

# A stamp is (barriers passed, warp, instruction) as one number.
WARP_SHIFT, EPOCH_SHIFT = 20, 28
INSTRUCTION = (1 << WARP_SHIFT) - 1
WARP = (1 << EPOCH_SHIFT - WARP_SHIFT) - 1
IN_FLIGHT = 1 << 62
# What memory holds before it is written: NaN in every float, -1 in every integer.
UNWRITTEN = 0xFF


class Conflict(Exception):
    """An access that is not allowed.

    Attributes
    ----------
    place : which of the accesses
    byte : address
    other : the instruction it conflicts with, or None
    why : words for a person, behind the names of both
    """

    def __init__(self, place: int, byte: int, other: int | None, why: str) -> None:
        super().__init__(why)
        self.place, self.byte, self.other, self.why = place, byte, other, why


@dataclass(frozen=True)
class Access:
    """One instruction of several threads.

    Attributes
    ----------
    instruction : its number
    threads : which of the batch
    addresses : where each of them reads or writes
    size : bytes of each
    """

    instruction: int
    threads: Integers
    addresses: Integers
    size: int


@dataclass
class Copies:
    """Copies in flight, started by one instruction.

    Attributes
    ----------
    groups : number of the group each will be committed in, counted by its thread
    data : bytes [n, size]
    """

    access: Access
    groups: Integers
    data: NDArray[np.uint8]

    def part(self, chosen: NDArray[np.bool_]) -> Copies:
        """Some of them."""
        access = self.access
        chosen_access = Access(
            access.instruction, access.threads[chosen], access.addresses[chosen], access.size
        )
        return Copies(chosen_access, self.groups[chosen], self.data[chosen])


class SharedMemory:
    """Of some programs of so many threads each.

    Parameters
    ----------
    unit : bytes of the smallest access
    """

    def __init__(self, *, programs: int, threads: int, size: int, unit: int) -> None:
        self.threads, self.size, self.unit = threads, size, unit
        self.stride = max(16, -(-size // 16) * 16)
        self.memory = np.full(programs * self.stride, UNWRITTEN, np.uint8)
        everyone = np.arange(programs * threads)
        self.program = everyone // threads
        self.warp = everyone % threads // 32
        self.warps = -(-threads // 32)
        self.epoch = np.ones(programs, np.int64)
        units = len(self.memory) // unit
        self.written = np.zeros(units, np.int64)
        self.read_by = np.zeros((self.warps, units), np.int64)
        self.committed = np.zeros(len(everyone), np.int64)
        self.in_flight: list[Copies] = []
        self._stamps()

    def barrier(self, programs: NDArray[np.bool_]) -> None:
        """All threads of these programs have met."""
        self.epoch[programs] += 1
        self._stamps()

    def _stamps(self) -> None:
        """Stamps of every thread, and the least one of the time since the last barrier."""
        self.since = self.epoch[self.program] << EPOCH_SHIFT
        self.mine = self.since | self.warp << WARP_SHIFT

    def read(self, access: Access, count: int, dtype: np.dtype[Any]) -> Array:
        """`count` numbers from each address, [n, count].

        Raises
        ------
        Conflict : an address is beyond the memory, a race, or a copy is in flight
        """
        units = self._units(access)
        self._require_read(access, units)
        view = self.memory.view(dtype)
        places = self._first_bytes(access) // dtype.itemsize
        return view[places[:, None] + np.arange(count)]

    def write(self, access: Access, values: Array) -> None:
        """Numbers [n, count] to each address; errors as in `read`."""
        units = self._units(access)
        self._require_write(access, units)
        self._put(access, values)
        self.written[units] = self._stamp(access)[:, None]

    def start_copies(self, access: Access, data: NDArray[np.uint8]) -> None:
        """Bytes [n, size] are on their way to each address; errors as in `read`."""
        units = self._units(access)
        self._require_write(access, units)
        self.written[units] = self._stamp(access)[:, None] | IN_FLIGHT
        places = self._first_bytes(access)
        self.memory[places[:, None] + np.arange(access.size)] = UNWRITTEN
        self.in_flight.append(Copies(access, self.committed[access.threads], data))

    def commit(self, threads: Integers) -> None:
        """What these threads started since their last commit is a group."""
        self.committed[threads] += 1

    def wait(self, threads: NDArray[np.bool_], pending: int | None) -> None:
        """Deliver what these threads started, but for their last groups.

        Parameters
        ----------
        threads : of the batch
        pending : how many groups may stay in flight; None waits for all, committed or not
        """
        left = []
        for copies in self.in_flight:
            own = copies.access.threads
            arrived = threads[own]
            if pending is not None:
                arrived = arrived & (copies.groups < self.committed[own] - pending)
            if arrived.any():
                self._deliver(copies if arrived.all() else copies.part(arrived))
            if not arrived.all():
                left.append(copies.part(~arrived))
        self.in_flight = left

    def _deliver(self, copies: Copies) -> None:
        self._put(copies.access, copies.data)
        self.written[self._units(copies.access)] = self._stamp(copies.access)[:, None]

    def _put(self, access: Access, values: Array) -> None:
        view = self.memory.view(values.dtype)
        places = self._first_bytes(access)[:, None] // values.dtype.itemsize
        places = places + np.arange(values.shape[1])
        view[places] = values
        # bits, so that NaN equals itself
        different = (view[places] != values).any(axis=1)
        if different.any():
            self._refuse(access, different, "another thread writes another number to it at once")

    def _first_bytes(self, access: Access) -> Integers:
        return self.program[access.threads] * self.stride + access.addresses

    def _units(self, access: Access) -> Integers:
        """The units of each access, [n, size / unit]."""
        outside = (access.addresses < 0) | (access.addresses + access.size > self.size)
        if outside.any():
            why = f"is beyond the {self.size} bytes of shared memory"
            self._refuse(access, outside, why)
        if (odd := access.addresses % access.size != 0).any():
            self._refuse(access, odd, f"is not a multiple of {access.size}")
        first = self._first_bytes(access) // self.unit
        return first[:, None] + np.arange(access.size // self.unit)

    def _refuse(self, access: Access, faulty: NDArray[np.bool_], why: str) -> None:
        place = int(np.argmax(faulty))
        raise Conflict(place, int(access.addresses[place]), None, why)

    def _stamp(self, access: Access) -> Integers:
        return self.mine[access.threads] | access.instruction

    def _require_read(self, access: Access, units: Integers) -> None:
        self._require_unwritten(access, units, "reads")
        stamps = self._stamp(access)
        warps = self.warp[access.threads]
        self.read_by[warps[:, None], units] = stamps[:, None]

    def _require_write(self, access: Access, units: Integers) -> None:
        self._require_unwritten(access, units, "writes")
        since = self.since[access.threads][:, None]
        warps = self.warp[access.threads][:, None]
        for warp in range(self.warps):
            seen = self.read_by[warp][units]
            races = (seen >= since) & (warps != warp)
            if races.any():
                self._race(access, races, seen, "writes", "was read by")

    def _require_unwritten(self, access: Access, units: Integers, verb: str) -> None:
        """By other warps since the last barrier, or by a copy still in flight."""
        seen = self.written[units]
        mine = self.mine[access.threads][:, None]
        races = (seen >= self.since[access.threads][:, None]) & ((seen ^ mine) > INSTRUCTION)
        if races.any():
            self._race(access, races, seen, verb, "was written by")

    def _race(
        self, access: Access, races: NDArray[np.bool_], seen: Integers, verb: str, how: str
    ) -> None:
        place, unit = (int(part) for part in np.argwhere(races)[0])
        stamp = int(seen[place, unit])
        byte = int(access.addresses[place]) + unit * self.unit
        if stamp & IN_FLIGHT:
            why = f"{verb} it while a copy to it is in flight, started by"
        else:
            warp = stamp >> WARP_SHIFT & WARP
            why = f"{verb} it, and without a barrier between it {how} warp {warp} with"
        raise Conflict(place, byte, stamp & INSTRUCTION, why)
