"""Threads among each other: shuffles, tensor cores, branches, barriers, atomics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from m3_kernels.testing.ptx.faults import Fault
from tests.kernels.ptx.handwritten import launch

RANDOM = torch.Generator().manual_seed(0)
LANES = range(32)


def random_bits(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=RANDOM).int()


def source_of(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """As the pseudocode of the PTX ISA under shfl.sync."""
    clamp, segment = c & 0x1F, c >> 8 & 0x1F
    most = lane & segment | clamp & ~segment
    least = lane & segment
    if mode == "up":
        j = lane - b
        inside = j >= most
    elif mode == "down":
        j = lane + b
        inside = j <= most
    elif mode == "bfly":
        j = lane ^ b
        inside = j <= most
    else:
        j = least | b & ~segment
        inside = j <= most
    return (j, True) if inside else (lane, False)


@pytest.mark.parametrize("segment", [0, 0x1800])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, segment: int) -> None:
    limits = segment | (0 if mode == "up" else 31)
    for b in (0, 1, 5, 16, 31):
        given, found, inside = random_bits(64), random_bits(64), random_bits(64)
        launch(
            f"""
            ld.global.b32 %r10, [%rd10];
            shfl.sync.{mode}.b32 %r11|%p1, %r10, {b}, {limits}, -1;
            st.global.b32 [%rd11], %r11;
            selp.b32 %r12, 1, 0, %p1;
            st.global.b32 [%rd12], %r12;
            """,
            *(given, found, inside),
            threads=64,
        )
        wanted = [source_of(mode, lane, b, limits) for lane in LANES]
        for warp in range(2):
            part = slice(32 * warp, 32 * warp + 32)
            assert found[part].tolist() == [int(given[part][j]) for j, _ in wanted], (mode, b)
            assert inside[part].tolist() == [int(there) for _, there in wanted]


def test_a_shuffle_by_each_thread_s_own_number() -> None:
    given, sources = random_bits(32), torch.randperm(32, generator=RANDOM).int()
    found = torch.zeros(32, dtype=torch.int32)
    launch(
        """
        ld.global.b32 %r10, [%rd10];
        ld.global.b32 %r11, [%rd11];
        shfl.sync.idx.b32 %r12, %r10, %r11, 31, -1;
        st.global.b32 [%rd12], %r12;
        """,
        *(given, sources, found),
    )
    assert torch.equal(found, given[sources.long()])


def test_reductions_and_votes() -> None:
    given = torch.randint(-50, 50, (64,), generator=RANDOM).int()
    found = torch.zeros(64, 5, dtype=torch.int32)
    launch(
        """
        ld.global.b32 %r10, [%rd10];
        redux.sync.add.s32 %r11, %r10, -1;
        redux.sync.min.s32 %r12, %r10, -1;
        redux.sync.max.s32 %r13, %r10, 0xffffffff;
        setp.gt.s32 %p1, %r10, 0;
        vote.sync.ballot.b32 %r14, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;
        selp.b32 %r15, 1, 0, %p2;
        mad.wide.u32 %rd20, %r3, 20, %rd1;
        st.global.b32 [%rd20], %r11;
        st.global.b32 [%rd20+4], %r12;
        st.global.b32 [%rd20+8], %r13;
        st.global.b32 [%rd20+12], %r14;
        st.global.b32 [%rd20+16], %r15;
        """,
        *(given, found),
        threads=64,
    )
    for warp in range(2):
        part = given[32 * warp : 32 * warp + 32]
        ballot = sum(1 << lane for lane in LANES if part[lane] > 0)
        signed = ballot - 2**32 if ballot >= 2**31 else ballot
        wanted = [int(part.sum()), int(part.min()), int(part.max()), signed, int((part > 0).any())]
        assert found[32 * warp : 32 * warp + 32].tolist() == [wanted] * 32


def places(rows: int, columns: int, size: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(lane, register, number within it, row, column) of mma.m16n8 from the PTX ISA.

    Left operands of 16 rows have registers (row, row + 8, row with the further columns, both);
    right ones, given here transposed with 8 rows, (row, row with the further columns).
    """
    per = 4 // size
    registers = rows * columns * size // 128
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for register in range(registers):
            for number in range(per):
                if rows == 16:
                    row = group + 8 * (register % 2)
                    column = thread * per + number + 4 * per * (register // 2)
                else:
                    row = group
                    column = thread * per + number + 4 * per * register
                yield lane, register, number, row, column


def spread(matrix: Tensor) -> Tensor:
    """A matrix [rows, columns] as registers int32 [32 lanes, registers]."""
    rows, columns = matrix.shape
    size = matrix.element_size()
    raw = matrix.contiguous().view(torch.uint8).view(rows, columns, size)
    found = torch.zeros(32, rows * columns * size // 128, 4 // size, size, dtype=torch.uint8)
    for lane, register, number, row, column in places(rows, columns, size):
        found[lane, register, number] = raw[row, column]
    return found.flatten(1).view(torch.int32)


PRODUCTS = [
    ("m16n8k16", "bf16", torch.bfloat16, 16),
    ("m16n8k8", "bf16", torch.bfloat16, 8),
    ("m16n8k16", "f16", torch.float16, 16),
    ("m16n8k8", "tf32", torch.float32, 8),
    ("m16n8k32", "e4m3", torch.float8_e4m3fn, 32),
    ("m16n8k32", "s8", torch.int8, 32),
]


@pytest.mark.parametrize(("shape", "name", "dtype", "k"), PRODUCTS, ids=lambda value: str(value))
def test_products_of_tensor_cores(shape: str, name: str, dtype: torch.dtype, k: int) -> None:
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, size, generator=RANDOM) for size in ((16, k), (k, 8)))
    else:
        # of few bits, so that any order of adding them up gives the same
        a, b = (torch.randint(-8, 9, size, generator=RANDOM) / 4 for size in ((16, k), (k, 8)))
    a, b = a.to(dtype), b.to(dtype)
    integers = dtype == torch.int8
    c = torch.randint(-99, 100, (16, 8), generator=RANDOM)
    c = c.int() if integers else c.float() / 8
    left, right = spread(a), spread(b.T.contiguous())
    # the sum: columns 2 t and 2 t + 1 of rows g and g + 8
    lanes = torch.arange(32)
    rows = lanes[:, None] // 4 + torch.tensor([0, 0, 8, 8])
    columns = 2 * (lanes[:, None] % 4) + torch.tensor([0, 1, 0, 1])
    held = c[rows, columns].contiguous().view(torch.int32)
    found = torch.zeros(32, 4, dtype=torch.int32)
    counts = [left.shape[1], right.shape[1]]
    result = "s32" if integers else "f32"
    loads, names = [], []
    for place, count in enumerate((*counts, 4)):
        loads.append(f"mul.lo.s32 %r9, %r0, {4 * count}; cvt.u64.u32 %rd20, %r9;")
        loads.append(f"add.s64 %rd20, %rd20, %rd{place};")
        mine = [f"%r{20 + 10 * place + i}" for i in range(count)]
        loads += [f"ld.global.b32 {one}, [%rd20+{4 * i}];" for i, one in enumerate(mine)]
        names.append("{" + ", ".join(mine) + "}")
    launch(
        f"""
        {" ".join(loads)}
        mma.sync.aligned.{shape}.row.col.{result}.{name}.{name}.{result}
            {{%r60, %r61, %r62, %r63}}, {names[0]}, {names[1]}, {names[2]};
        mad.wide.u32 %rd20, %r0, 16, %rd3;
        st.global.v4.b32 [%rd20], {{%r60, %r61, %r62, %r63}};
        """,
        *(left, right, held, found),
    )
    exact = a.double() @ b.double() + c.double()
    got = torch.zeros(16, 8, dtype=torch.float64)
    got[rows, columns] = found.view(torch.int32 if integers else torch.float32).double()
    assert torch.equal(got, exact)


def test_what_tensor_cores_sum_is_rounded_once() -> None:
    """Products that float32 sums would lose."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[0, :3], b[:3, 0] = torch.tensor([2.0**30, 1.0, -(2.0**30)]), 1.0
    left, right = spread(a.bfloat16()), spread(b.T.contiguous().bfloat16())
    found = torch.zeros(32, 4)
    launch(
        """
        mad.wide.u32 %rd20, %r0, 16, %rd0;
        ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd20];
        mad.wide.u32 %rd21, %r0, 8, %rd1;
        ld.global.v2.b32 {%r14, %r15}, [%rd21];
        mov.b32 %r16, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23},
            {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r16, %r16, %r16};
        mad.wide.u32 %rd22, %r0, 16, %rd2;
        st.global.v4.b32 [%rd22], {%r20, %r21, %r22, %r23};
        """,
        *(left, right, found),
    )
    assert found[0, 0] == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    """Four matrices, whose rows lie in shared memory in a random order."""
    data = torch.randint(-(2**15), 2**15, (32, 8), generator=RANDOM).to(torch.int16)
    order = torch.randperm(32, generator=RANDOM).int()
    found = torch.zeros(32, 4, dtype=torch.int32)
    launch(
        f"""
        mad.wide.u32 %rd20, %r0, 16, %rd0;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd20];
        shl.b32 %r14, %r0, 4;
        st.shared.v4.b32 [%r14], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ld.global.b32 %r15, [%rd11];
        shl.b32 %r15, %r15, 4;
        ldmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16
            {{%r20, %r21, %r22, %r23}}, [%r15];
        mad.wide.u32 %rd22, %r0, 16, %rd2;
        st.global.v4.b32 [%rd22], {{%r20, %r21, %r22, %r23}};
        """,
        *(data, order, found),
        shared=512,
    )
    halves = found.view(torch.int16).view(32, 4, 2)
    matrices = data[order.long()].view(4, 8, 8)
    for lane in LANES:
        for register in range(4):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if transposed:
                    row, column = column, row
                assert halves[lane, register, half] == matrices[register, row, column]


def test_threads_part_and_meet_again() -> None:
    """A loop with as many turns as each thread likes, in programs of several kinds."""
    turns = torch.randint(0, 9, (3 * 64,), generator=RANDOM).int()
    found = torch.zeros(3 * 64, dtype=torch.int32)
    launch(
        """
        ld.global.b32 %r10, [%rd10];
        mov.b32 %r11, 0;
        mov.b32 %r12, 1;
        setp.eq.s32 %p1, %r10, 0;
        @%p1 bra $END;
        $LOOP:
        add.s32 %r11, %r11, 1;
        add.s32 %r12, %r12, %r12;
        setp.lt.s32 %p2, %r11, %r10;
        @%p2 bra $LOOP;
        $END:
        redux.sync.add.s32 %r13, %r12, -1;
        st.global.b32 [%rd11], %r13;
        """,
        *(turns, found),
        threads=64,
        programs=3,
    )
    sums = (2**turns).view(6, 32).sum(1)
    assert torch.equal(found, sums.repeat_interleave(32).int())


PARTED = """
    setp.lt.u32 %p1, %r0, 7;
    @%p1 bra $END;
    shfl.sync.bfly.b32 %r11, %r0, 1, 31, -1;
    $END:
"""


def test_a_warp_that_has_parted_cannot_exchange() -> None:
    with pytest.raises(Fault, match=r"shfl.*thread 0 of program \(0, 0, 0\).*elsewhere"):
        launch(PARTED)


def test_a_barrier_that_some_never_reach() -> None:
    with pytest.raises(Fault, match=r"thread 0 of program .* waits at a barrier"):
        launch(
            """
            setp.lt.u32 %p1, %r0, 32;
            @%p1 bra $LOOP;
            bar.sync 0;
            bra.uni $END;
            $LOOP:
            bar.sync 0;
            $END:
            """,
            threads=64,
        )


def test_atomics_follow_one_another() -> None:
    """In an order that the seed decides; a counter that everyone raises misses nobody."""
    counter = torch.zeros(1, dtype=torch.int32)
    orders = []
    for seed in (0, 1):
        counter.zero_()
        found = torch.zeros(4 * 32, dtype=torch.int32)
        launch(
            """
            mov.b32 %r10, 1;
            atom.global.gpu.acq_rel.add.u32 %r11, [%rd0], %r10;
            st.global.b32 [%rd11], %r11;
            """,
            *(counter, found),
            programs=4,
            seed=seed,
            batch_threads=64,
        )
        assert counter.item() == 128
        assert sorted(found.tolist()) == list(range(128))
        orders.append(found.tolist())
    assert orders[0] != orders[1]


def test_programs_run_in_any_order_and_number() -> None:
    """The same whatever the seed and however many at a time, down to one."""
    for seed, batch in ((0, 1), (1, 64), (2, 4096)):
        found = torch.zeros(5 * 32, dtype=torch.int32)
        launch("st.global.b32 [%rd10], %r3;", found, programs=5, seed=seed, batch_threads=batch)
        assert torch.equal(found, torch.arange(160).int())


def test_counts() -> None:
    """Of programs, not of threads."""
    counts = launch("add.s32 %r9, %r0, 1; add.s32 %r9, %r9, 1;", programs=3, threads=64)
    assert counts["add.s32"] == 6
