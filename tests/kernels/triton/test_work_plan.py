"""The work plan: the kernel against plain torch, and what the other kernels rely on."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3_kernels.testing.cases import Case, all_cases, build
from m3_kernels.work_plan import (
    DECODE_ROWS,
    TILE_ROWS,
    WorkPlan,
    allocate_work_plan,
    fill_work_plan,
    make_work_plan,
)

CASES = [case for case in all_cases() if case.dtype == torch.float32 and case.num_rows < 100]
FIELDS = ("cum_blocks", "cum_tiles", "range_start", "range_request", "row_request")


def step(*requests: tuple[int, int]) -> dict[str, Any]:
    """A step of (sequence length, query rows)."""
    return {
        "cu_seqlens_q": torch.tensor([0, *(rows for _, rows in requests)]).cumsum(0).int(),
        "seq_lens": torch.tensor([length for length, _ in requests], dtype=torch.int32),
    }


def assert_same(plan: WorkPlan, expected: WorkPlan) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(plan, field), getattr(expected, field)), field


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case) -> None:
    inputs = build(case)
    batch: dict[str, Any] = {"cu_seqlens_q": inputs.cu_seqlens_q, "seq_lens": inputs.seq_lens}
    rows = inputs.q.shape[0]
    triton, reference = (
        make_work_plan(**batch, num_rows=rows, page_size=case.page_size, backend=backend)
        for backend in ("triton", "reference")
    )
    assert_same(triton, reference)
    assert triton.max_blocks == reference.max_blocks


def test_edges_of_the_kinds_and_of_what_a_program_sees_at_once() -> None:
    """0, 1, 7, 8 and 9 rows, in more requests than one load of the kernel takes."""
    batch = step(*[(120 + rows, rows) for rows in (0, 1, 7, DECODE_ROWS, DECODE_ROWS + 1)] * 52)
    triton, reference = (
        make_work_plan(**batch, num_rows=52 * 25 + 3, page_size=16, backend=backend)
        for backend in ("triton", "reference")
    )
    assert_same(triton, reference)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    requests=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 12)), max_size=300),
    padding=st.integers(0, 5),
    page_size=st.sampled_from([1, 16, 24, 128]),
    num_programs=st.integers(1, 70),
)
def test_every_block_and_row_has_one_taker(
    requests: list[tuple[int, int]], padding: int, page_size: int, num_programs: int
) -> None:
    batch = step(*requests)
    rows = int(batch["cu_seqlens_q"][-1]) + padding
    plan, expected = (
        make_work_plan(
            **batch,
            num_rows=rows,
            page_size=page_size,
            num_programs=num_programs,
            backend=backend,
        )
        for backend in ("triton", "reference")
    )
    assert_same(plan, expected)

    blocks = [-(-length // page_size) if 1 <= q <= DECODE_ROWS else 0 for length, q in requests]
    owners = [request for request, count in enumerate(blocks) for _ in range(count)]
    starts = plan.range_start.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(owners)
    sizes = [b - a for a, b in itertools.pairwise(starts)]
    assert max(sizes) - min(sizes) <= 1
    for start, size, request in zip(starts, sizes, plan.range_request.tolist(), strict=False):
        if size > 0:
            assert owners[start] == request
    by_row = [request for request, (_, q) in enumerate(requests) for _ in range(q)]
    assert plan.row_request.tolist() == by_row + [len(requests)] * padding
    tiles = [
        len({position // TILE_ROWS for position in range(length - q, length)})
        if q > DECODE_ROWS
        else 0
        for length, q in requests
    ]
    assert plan.cum_tiles.diff().tolist() == tiles
    assert sum(tiles) <= rows // TILE_ROWS + 2 * len(requests)


def test_reuses_its_buffers() -> None:
    buffers = allocate_work_plan(max_reqs=5, max_rows=90, device=torch.device("cpu"))
    for name in FIELDS:
        getattr(buffers, name).fill_(-9)
    before_zero = ((0, 12), (5, 40), (3, 9))
    for requests in (((700, 1), (40, 30), (90, 8)), ((0, 0),), (), ((31, 31), (5, 5)), before_zero):
        batch = step(*requests)
        rows = int(batch["cu_seqlens_q"][-1])
        plan = fill_work_plan(
            buffers,
            **batch,
            num_rows=rows,
            max_query_len=64,
            max_seq_len=1024,
            page_size=16,
            backend="triton",
        )
        assert plan.max_blocks == 64
        assert plan.cum_blocks.data_ptr() == buffers.cum_blocks.data_ptr()
        expected = make_work_plan(**batch, num_rows=rows, page_size=16, backend="reference")
        assert_same(plan, expected)


def test_counts_do_not_overflow() -> None:
    """256 requests of a million tokens: the flat list times the number of programs."""
    batch = step(*[(2**20, 1)] * 256)
    plan, expected = (
        make_work_plan(**batch, num_rows=256, page_size=128, num_programs=1100, backend=backend)
        for backend in ("triton", "reference")
    )
    assert_same(plan, expected)
    assert int(plan.range_start[-1]) == 256 * 8192


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"seq_lens": torch.zeros(2, dtype=torch.int64)},
            TypeError,
            "seq_lens must be torch.int32",
        ),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, ValueError, "cu_seqlens_q must be"),
        ({"num_rows": 9}, ValueError, "buffers hold 2 requests and 8 rows; the step has 2 and 9"),
        ({"num_rows": -1}, ValueError, "num_rows must not be negative; got -1"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1; got 0"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'triton' or 'reference'"),
    ],
)
def test_wrong_calls(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        **step((9, 1), (3, 2)),
        "num_rows": 3,
        "max_query_len": 2,
        "max_seq_len": 9,
        "page_size": 16,
    }
    buffers = allocate_work_plan(max_reqs=2, max_rows=8, device=torch.device("cpu"))
    with pytest.raises(error, match=message):
        fill_work_plan(buffers, **{**arguments, **change})  # pyright: ignore[reportArgumentType]


def test_wrong_sizes() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="max_reqs must not be negative; got -1"):
        allocate_work_plan(max_reqs=-1, max_rows=8, device=cpu)
    with pytest.raises(ValueError, match="num_programs must be at least 1; got 0"):
        allocate_work_plan(max_reqs=1, max_rows=8, device=cpu, num_programs=0)
    buffers = allocate_work_plan(max_reqs=1, max_rows=8, device=cpu)
    assert all(t.dtype == torch.int32 for t in dataclasses.astuple(buffers))
