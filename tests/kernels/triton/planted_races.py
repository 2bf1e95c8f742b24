"""Kernels with faults that the tests of `m3_kernels.testing.races` look for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_together(out, SHARED: tl.constexpr):
    """Every program writes 16 numbers, the last SHARED of them its neighbour's first."""
    tl.store(out + tl.program_id(0) * (16 - SHARED) + tl.arange(0, 16), 1.0)


@triton.jit
def read_neighbour(numbers, DISTANCE: tl.constexpr):
    """Every program writes its number and reads the one that lies so far from it."""
    mine = tl.program_id(0)
    tl.store(numbers + mine, tl.load(numbers + mine + DISTANCE) + 1.0)


@triton.jit
def last_sums(parts, arrivals, out, PROGRAMS: tl.constexpr, SEM: tl.constexpr):
    """The program that arrives last adds up what all have written."""
    tl.store(parts + tl.program_id(0), 1.0)
    if tl.atomic_add(arrivals, 1, sem=SEM) == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, PROGRAMS)), axis=0))
        tl.store(arrivals, 0)


@triton.jit
def one_address(out):
    """Two lanes write each number."""
    tl.store(out + tl.arange(0, 16) // 2, 1.0)


@triton.jit
def copy(numbers, out, count, masked: tl.constexpr):
    """Sixteen numbers, or as many as there are."""
    lane = tl.arange(0, 16)
    mask = (lane < count) | (not masked)
    tl.store(out + lane, tl.load(numbers + lane, mask=mask, other=0.0))
