"""The time model by hand: what bounds a launch."""

from __future__ import annotations

import dataclasses

import pytest

from m3_kernels.testing.compile_gate import DEPENDENCY, Compiled
from m3_kernels.testing.sass import NO_LOOPS, Loop, Timeline
from m3_kernels.testing.time_model import CHIPS, Work, microseconds, turn

CHIP = CHIPS["H200"]
LOOP = Loop(200, 16, 0, 2, 8, 0, period=700)
FOLD = Loop(80, 0, 0, 0, 0, awaited_loads=8, period=400)
# 4 warps, two programs on a multiprocessor
KERNEL = Compiled(
    128, 0, 100_000, 4, dependency=DEPENDENCY, timeline=Timeline((LOOP, FOLD), 0, 2000, 300)
)
FIRST = 900 + 2000


def test_a_turn_is_as_long_as_what_it_waits_for() -> None:
    assert turn(CHIP, KERNEL, 0, 1) == 700
    # 2 programs of 4 warps: 1,600 instructions through 4 schedulers at 85 %
    busy = dataclasses.replace(
        KERNEL, timeline=Timeline((dataclasses.replace(LOOP, period=9),), 0, 0, 0)
    )
    assert turn(CHIP, busy, 0, 2) == pytest.approx(1600 / 4 / 0.85)
    converting = dataclasses.replace(LOOP, conversions=128)
    slow = dataclasses.replace(KERNEL, timeline=Timeline((converting,), 0, 0, 0))
    # 4 warps of 128 conversions, 16 lanes
    assert turn(CHIP, slow, 0, 1) == 4 * 128 * 32 / 16
    # 128 x 128 x 128 at 4,096 a cycle, computed twice
    twice = dataclasses.replace(KERNEL, duplicates=2)
    assert turn(CHIP, twice, 2 * 128**3, 1) == 700 + 2048
    assert turn(CHIP, twice, 2 * 128**3, 2) == 2 * 2048


def test_one_program_is_a_path() -> None:
    time = microseconds(CHIP, KERNEL, Work(programs=1, turns=4))
    assert time == pytest.approx(0.7 + (FIRST + 300 + 4 * 700) / CHIP.clock)
    folded = microseconds(CHIP, KERNEL, Work(programs=1, turns=4, fold_turns=8))
    assert folded - time == pytest.approx(8 * 400 / CHIP.clock)
    waiting = microseconds(CHIP, KERNEL, Work(programs=1, turns=4, awaited=3))
    assert waiting - time == pytest.approx(3 * 900 / CHIP.clock)


def test_waves() -> None:
    """264 programs fit; one more begins another wave, and many share the device out evenly."""
    one, two, many = (
        microseconds(CHIP, KERNEL, Work(programs=programs, turns=4)) - 0.7
        for programs in (264, 265, 2640 * 4)
    )
    assert two == pytest.approx(2 * one)
    assert many == pytest.approx(40 * one)


def test_bytes_and_caches_bound_it() -> None:
    moved = microseconds(CHIP, KERNEL, Work(programs=1, bytes_moved=43_000_000))
    assert moved == pytest.approx(0.7 + 10 + FIRST / CHIP.clock)
    cached = microseconds(CHIP, KERNEL, Work(programs=1, l2_bytes=55_000_000))
    assert cached == pytest.approx(0.7 + 10)


def test_a_kernel_without_loops_in_the_ordinary_way() -> None:
    plain = dataclasses.replace(
        KERNEL, dependency=(), timeline=dataclasses.replace(NO_LOOPS, before=1000)
    )
    assert microseconds(CHIP, plain, Work(programs=1)) == pytest.approx(1.2 + 1900 / CHIP.clock)
