"""Loops, control bits and cycles out of a disassembly, on code written by hand."""

from __future__ import annotations

import dataclasses

import pytest

from m3_kernels.launch import Launch
from m3_kernels.testing.compile_gate import Compiled, LoopBudget, Variant, duplicates, faults
from m3_kernels.testing.sass import LATENCY, NO_LOOPS, Code, Loop, Timeline, read


def line(text: str, *, stall: int = 1, raises: int = 7, waits: int = 0) -> str:
    """One instruction as nvdisasm prints it; its address does not matter."""
    control = stall << 41 | raises << 46 | 7 << 49 | waits << 52
    return f"        /*0000*/  {text} ;  /* 0x{0:016x} */\n  /* 0x{control:016x} */\n"


ADD = line("IADD3 R1, R2, R3, RZ", stall=2)
START = line("MOV R1, c[0x0][0x28]", stall=5)
END = line("EXIT")


def loop(label: str, *body: str) -> str:
    return f"{label}:\n{''.join(body)}{line(f'@P0 BRA `({label})', stall=5)}"


def test_a_loop_of_fixed_latencies() -> None:
    found = read(START + loop(".L_x_0", *[ADD] * 20) + END)
    assert found.hot == 0
    assert found.loops == (Loop(21, 0, 0, 0, 0, 0, 45),)
    assert (found.before, found.after) == (5, 1)


def test_scoreboards_hold_who_waits() -> None:
    shuffle = line("SHFL.BFLY PT, R4, R5, 0x1, 0x1f", raises=2)
    waiting = line("FADD R6, R4, R4", waits=1 << 2)
    alone = read(loop(".L_x_0", *[ADD] * 12, shuffle) + END).loops[0]
    held = read(loop(".L_x_0", *[ADD] * 12, shuffle, waiting) + END).loops[0]
    assert alone.shuffles == held.shuffles == 1
    # one cycle to issue it, which is hidden, and the wait
    assert held.period == alone.period + LATENCY["SHFL"]


def test_loads_that_the_same_turn_waits_for() -> None:
    load = line("LDG.E.128 R8, desc[UR4][R2.64]", raises=0)
    use = line("HFMA2 R8, R8, R8, R8", waits=1)
    awaited = read(loop(".L_x_0", *[ADD] * 12, load, use) + END).loops[0]
    ahead = read(loop(".L_x_0", use, *[ADD] * 12, load) + END).loops[0]
    assert (awaited.awaited_loads, ahead.awaited_loads) == (1, 0)
    assert awaited.period > LATENCY["LDG"]


def test_what_is_counted() -> None:
    code = [
        line("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24"),
        line("F2F.F32.F16 R1, R2"),
        line("F2FP.BF16.F32.PACK_AB R1, R2, R3"),
        line("BAR.SYNC.DEFER_BLOCKING 0x0"),
        line("@!P1 I2F.S8 R1, R2"),
    ]
    found = read(loop(".L_x_0", *[ADD] * 12, *code) + END).loops[0]
    assert (found.products, found.conversions, found.barriers) == (1, 2, 1)


def test_the_hot_loop_multiplies_and_is_the_shortest_that_does() -> None:
    product = line("HMMA.16816.F32.BF16 R4, R8, R12, R4")
    plain = loop(".L_x_0", *[ADD] * 50)
    masked = loop(".L_x_1", *[ADD] * 40, product)
    whole = loop(".L_x_2", *[ADD] * 20, product)
    assert read(plain + masked + whole + END).hot == 2
    assert read(plain + loop(".L_x_1", *[ADD] * 20) + END).hot == 0


def test_inner_loops_and_slow_paths() -> None:
    inner = loop(".L_x_1", *[ADD] * 20)
    nested = f".L_x_0:\n{ADD * 20}{inner}{ADD * 20}{line('@P1 BRA `(.L_x_0)')}"
    assert [found.instructions for found in read(nested + END).loops] == [21]
    # a slow path behind the end comes back into the loop and is none
    slow = f".L_x_3:\n{ADD * 20}{line('BRA `(.L_x_2)')}"
    body = f"{line('@P2 BRA `(.L_x_3)')}.L_x_2:\n{ADD * 20}"
    found = read(f"{loop('.L_x_0', ADD, body)}{END}{slow}").loops
    # way into it and out of it, and the slow path as a part of the turn
    assert [one.instructions for one in found] == [44]


def test_waiting_is_no_loop() -> None:
    spin = loop(".L_x_0", line("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"))
    assert read(spin + END) == Timeline((), -1, 7, 0)


def test_text_without_code_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction in what nvdisasm printed"):
        Code.parse("\t.headerflags @...\n")


TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, warpsPerCTA = [8, 1], instrShape = [16, 32, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, warpsPerCTA = [2, 2], instrShape = [16, 8]}>
%1 = ttng.warp_group_dot %a, %b, %c : !x * !y -> tensor<SIZExf32, #mma> loc(#loc1)
%2 = tt.dot %a, %b, %c : !x * !y -> tensor<32x16xf32, #mma1> loc(#loc2)
"""


def test_duplicates() -> None:
    assert duplicates(TTGIR.replace("SIZE", "128x32")) == 1
    assert duplicates(TTGIR.replace("SIZE", "64x32")) == 2
    assert duplicates(TTGIR.replace("SIZE", "64x32").replace("32x16xf32", "16x8xf32")) == 4
    assert duplicates("tt.return") == 1


BUDGET = LoopBudget(100, 500, conversions=4, barriers=2, shuffles=8, programs_per_sm=2)
VARIANT = Variant("v", Launch(None, (1,), {}), registers=255, shared=200_000, loop=BUDGET)


def compiled(**changes: int) -> Compiled:
    found = dataclasses.replace(Loop(100, 16, 4, 2, 8, 0, 500), **changes)
    counts = {"LDL": 0, "STL": 0}
    return Compiled(128, 0, 80_000, 4, counts, timeline=Timeline((found,), 0, 0, 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instructions": 101}, "hot loop: instructions 101, budget 100"),
        ({"period": 501}, "hot loop: period 501, budget 500"),
        ({"conversions": 5}, "hot loop: conversions 5, budget 4"),
        ({"barriers": 3}, "hot loop: barriers 3, budget 2"),
        ({"shuffles": 9}, "hot loop: shuffles 9, budget 8"),
        ({"awaited_loads": 1}, "hot loop: awaited loads 1, budget 0"),
    ],
)
def test_each_figure_has_its_budget(change: dict[str, int], said: str) -> None:
    assert faults(VARIANT, compiled(), 90) == []
    assert faults(VARIANT, compiled(**change), 90) == [f"sm_90 v: {said}"]


def test_duplicates_and_room_have_budgets() -> None:
    twice = dataclasses.replace(compiled(), duplicates=2)
    assert faults(VARIANT, twice, 90) == ["sm_90 v: hot loop: duplicates 2, budget 1"]
    large = dataclasses.replace(compiled(), shared=120_000)
    assert faults(VARIANT, large, 90) == ["sm_90 v: 1 programs on a multiprocessor, not 2"]
    gone = dataclasses.replace(compiled(), timeline=NO_LOOPS)
    assert faults(VARIANT, gone, 90) == ["sm_90 v: no loop"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "programs"),
    # by registers (each of 4 warps takes 5,376), by shared memory, by warps, by programs
    [(168, 0, 4, 90, 3), (64, 100_000, 4, 90, 2), (16, 0, 8, 89, 6), (16, 0, 1, 90, 32)],
)
def test_programs_on_a_multiprocessor(
    registers: int, shared: int, warps: int, arch: int, programs: int
) -> None:
    assert Compiled(registers, 0, shared, warps).programs_per_sm(arch) == programs
