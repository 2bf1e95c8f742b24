"""Global memory: the tensors of a call at their own addresses, and nothing else.

A region is all that lies behind tensors in one storage. Bytes between the numbers of a view belong
to no tensor, and may be neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3_kernels.testing.ptx.values import Array

Addresses = NDArray[np.int64]

# Larger ones are of tests for addresses past 32 bits, and mostly made of nothing.
LARGEST_MAP = 2**28


class OutOfBounds(Exception):
    """An access that is not allowed: which of those asked for, and why."""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(why)
        self.place, self.why = place, why


@dataclass(frozen=True)
class Region:
    """Bytes of one storage.

    Attributes
    ----------
    start, end : addresses
    memory : the bytes themselves
    allowed : which of them belong to tensors; None where all of them do
    """

    start: int
    end: int
    memory: NDArray[np.uint8]
    allowed: NDArray[np.bool_] | None


class GlobalMemory:
    """What a launch may touch."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_storage: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.regions = [_region(by_storage[start]) for start in sorted(by_storage)]
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def read(self, addresses: Addresses, count: int, dtype: np.dtype[Any]) -> Array:
        """`count` numbers from each address, [n, count].

        Raises
        ------
        OutOfBounds : an address is not allowed
        """
        found = np.empty((len(addresses), count), dtype)
        for region, chosen in self._regions(addresses, count * dtype.itemsize):
            view, places = _places(region, addresses[chosen], count, dtype)
            found[chosen] = view[places]
        return found

    def write(self, addresses: Addresses, values: Array) -> None:
        """Numbers [n, count] to each address.

        Raises
        ------
        OutOfBounds : an address is not allowed, or two threads write other numbers to one
        """
        count = values.shape[1]
        for region, chosen in self._regions(addresses, count * values.dtype.itemsize):
            view, places = _places(region, addresses[chosen], count, values.dtype)
            view[places] = values[chosen]
            different = (view[places] != values[chosen]).any(axis=1)
            if different.any():
                place = int(np.arange(len(addresses))[chosen][different][0])
                raise OutOfBounds(place, "another thread writes another number to it at once")

    def change(
        self,
        addresses: Addresses,
        dtype: np.dtype[Any],
        apply: Callable[[Any, int], Any],
        order: NDArray[np.int64],
    ) -> Array:
        """Atomically put `apply(number, i)` in the place of the number at address i.

        Parameters
        ----------
        order : of the accesses

        Returns
        -------
        What the numbers were.
        """
        found = np.empty(len(addresses), dtype)
        for place in order.tolist():
            address = addresses[place : place + 1]
            try:
                found[place] = self.read(address, 1, dtype)[0, 0]
                new = np.array(apply(found[place], place), dtype).reshape(1, 1)
                self.write(address, new)
            except OutOfBounds as error:
                raise OutOfBounds(place, error.why) from None
        return found

    def _regions(self, addresses: Addresses, size: int) -> Iterable[tuple[Region, Any]]:
        """Regions with the accesses that lie within them, all of them checked."""
        if not len(addresses):
            return []
        if (addresses % size).any():
            raise OutOfBounds(int(np.argmax(addresses % size != 0)), f"not a multiple of {size}")
        numbers = np.searchsorted(self.starts, addresses, side="right") - 1
        first = int(numbers[0])
        one = bool((numbers == first).all())
        found = []
        for number in [first] if one else np.unique(numbers).tolist():
            chosen = slice(None) if one else np.flatnonzero(numbers == number)
            self._require(number, addresses, chosen, size)
            found.append((self.regions[number], chosen))
        return found

    def _require(self, number: int, addresses: Addresses, chosen: Any, size: int) -> None:
        """Raise OutOfBounds unless all bytes belong to tensors."""
        mine = addresses[chosen]
        if number < 0:
            outside = np.ones(len(mine), bool)
        else:
            region = self.regions[number]
            outside = mine + size > region.end
            if not outside.any() and region.allowed is not None:
                bytes_ = (mine - region.start)[:, None] + np.arange(size)
                outside = ~region.allowed[bytes_].all(axis=1)
        if outside.any():
            place = np.arange(len(addresses))[chosen][outside][0]
            raise OutOfBounds(int(place), "which is in no tensor of the launch")


def _places(
    region: Region, addresses: Addresses, count: int, dtype: np.dtype[Any]
) -> tuple[Array, NDArray[np.int64]]:
    """The region as numbers, and which of them are meant, [n, count]."""
    size = dtype.itemsize
    whole = len(region.memory) // size * size
    view = region.memory[:whole].view(dtype)
    places = (addresses - region.start) // size
    return view, places[:, None] + np.arange(count)


def _region(tensors: list[Tensor]) -> Region:
    """What lies behind tensors of one storage."""
    storage = tensors[0].untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
    start = storage.data_ptr()
    allowed = None
    if storage.nbytes() <= LARGEST_MAP:
        marks = torch.zeros(storage.nbytes(), dtype=torch.bool)
        for tensor in tensors:
            size = tensor.element_size()
            shape = (*tensor.shape, size)
            strides = (*(stride * size for stride in tensor.stride()), 1)
            marks.as_strided(shape, strides, tensor.storage_offset() * size).fill_(True)
        allowed = None if bool(marks.all()) else marks.numpy()
    return Region(start, start + storage.nbytes(), memory.numpy(), allowed)
