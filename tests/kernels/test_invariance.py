"""The C++ kernels give every row the same bits whatever is computed beside it, and by whom."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3_kernels import kernel_families, native_build
from m3_kernels.capability import Backend
from m3_kernels.index_topk import index_topk
from m3_kernels.sparse_attention import sparse_attention
from m3_kernels.testing.cases import DTYPES, Case, Inputs, build, production_cases

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(kernel_families("cpu")[0].refusal is not None, reason="no C++ kernels here"),
]
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small steps of every kind: prefill, decode, verify, mixed, with and without a prefix."""
    page_size = draw(st.sampled_from([8, 16, 20, 32]))
    edge = st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1])
    requests = draw(
        st.lists(
            st.tuples(st.one_of(edge, st.integers(0, 150)), st.one_of(edge, st.integers(0, 40))),
            min_size=1,
            max_size=4,
        )
    )
    kv_heads, group = draw(st.sampled_from([(1, 4), (1, 16), (2, 1), (2, 3), (4, 2)]))
    return Case(
        "drawn",
        tuple(requests),
        num_q_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 32, 40, 128])),
        index_dim=draw(st.sampled_from([16, 24, 64])),
        page_size=page_size,
        topk=draw(st.integers(1, 6)),
        num_local_blocks=draw(st.integers(0, 2)),
        num_init_blocks=draw(st.integers(0, 2)),
        dtype=draw(st.sampled_from(DTYPES)),
        padding_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 1000)),
    )


def run(inputs: Inputs, backend: Backend = "native") -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, heads, topk], outputs and lse of both ops in sequence; all rows come first."""
    ids = index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        backend=backend,
    )
    lse = torch.full(inputs.q.shape[:2], torch.nan)
    out = sparse_attention(
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        ids,
        **inputs.batch,
        scale=inputs.scale,
        out=torch.full_like(inputs.q, torch.nan),
        lse=lse,
        backend=backend,
    )
    return ids.transpose(0, 1), out, lse


def part(inputs: Inputs, pieces: list[tuple[int, int, int]]) -> Inputs:
    """The step of only the rows `first:last`, counted in their request, of some requests."""
    starts = inputs.cu_seqlens_q.tolist()
    rows, counts, lengths = [], [0], []
    for request, first, last in pieces:
        all_rows = starts[request + 1] - starts[request]
        rows += range(starts[request] + first, starts[request] + last)
        counts.append(last - first)
        lengths.append(int(inputs.seq_lens[request]) - (all_rows - last))
    requests = [request for request, _, _ in pieces]
    return dataclasses.replace(
        inputs,
        q=inputs.q[rows],
        index_q=inputs.index_q[rows],
        page_table=inputs.page_table[requests],
        cu_seqlens_q=torch.tensor(counts).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
    )


def moved(inputs: Inputs) -> Inputs:
    """The same sequences on other pages of a larger pool."""
    pages = inputs.k_pages.shape[0]
    target = torch.randperm(pages * 2, generator=torch.Generator().manual_seed(1))[:pages]
    pools = []
    for pool in (inputs.k_pages, inputs.v_pages, inputs.index_k_pages):
        larger = torch.full((pages * 2, *pool.shape[1:]), torch.nan, dtype=pool.dtype)
        larger[target] = pool
        pools.append(larger)
    used = (inputs.page_table >= 0) & (inputs.page_table < pages)
    table = torch.where(used, target.int()[inputs.page_table.where(used, 0)], -1)
    return dataclasses.replace(
        inputs, k_pages=pools[0], v_pages=pools[1], index_k_pages=pools[2], page_table=table
    )


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@quick
@given(cases())
def test_results_are_finite_although_everything_unseen_is_nan(case: Case) -> None:
    inputs = build(case)
    ids, out, lse = run(inputs)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    assert (lse[: case.num_rows].isfinite()).all()
    assert (ids[case.num_rows :] == -1).all()
    assert (out[case.num_rows :] == 0).all()


@quick
@given(cases())
def test_pages_may_be_anywhere(case: Case) -> None:
    inputs = build(case)
    assert_same_bits(run(moved(inputs)), run(inputs))


@quick
@given(cases())
def test_threads_do_not_matter(case: Case) -> None:
    inputs = build(case)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(inputs))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@quick
@given(cases())
def test_company_does_not_matter(case: Case) -> None:
    inputs = build(case)
    together = run(inputs)
    starts = inputs.cu_seqlens_q.tolist()
    for request, (first, last) in enumerate(itertools.pairwise(starts)):
        alone = run(part(inputs, [(request, 0, last - first)]))
        assert_same_bits(alone, tuple(result[first:last] for result in together))


@quick
@given(cases(), st.lists(st.integers(1, 39), max_size=3))
def test_chunks_of_a_prefill_do_not_matter(case: Case, cuts: list[int]) -> None:
    inputs = build(case)
    together = run(inputs)
    starts = inputs.cu_seqlens_q.tolist()
    for request, (first, last) in enumerate(itertools.pairwise(starts)):
        bounds = sorted({0, last - first, *(cut for cut in cuts if cut < last - first)})
        for begin, end in itertools.pairwise(bounds):
            piece = run(part(inputs, [(request, begin, end)]))
            rows = slice(first + begin, first + end)
            assert_same_bits(piece, tuple(result[rows] for result in together))


@settings(quick, max_examples=12)
@given(cases())
def test_decode_equals_prefill(case: Case) -> None:
    inputs = build(case)
    together = run(inputs)
    starts = inputs.cu_seqlens_q.tolist()
    longest = max(b - a for a, b in itertools.pairwise(starts))
    assume(longest > 1)
    for step in range(longest):
        pieces = [
            (request, step, step + 1)
            for request, (a, b) in enumerate(itertools.pairwise(starts))
            if step < b - a
        ]
        rows = [starts[request] + step for request, _, _ in pieces]
        assert_same_bits(run(part(inputs, pieces)), tuple(result[rows] for result in together))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_real_geometry(dtype: torch.dtype) -> None:
    case = dataclasses.replace(production_cases()[0], requests=((2900, 40), (2047, 3)), dtype=dtype)
    inputs = build(case)
    together = run(inputs)
    torch.set_num_threads(1)
    assert_same_bits(run(moved(inputs)), together)
    torch.set_num_threads(2)
    for row in (0, 7, 8, 39):
        alone = run(part(inputs, [(0, row, row + 1)]))
        assert_same_bits(alone, tuple(result[row : row + 1] for result in together))
    verify = run(part(inputs, [(0, 36, 40), (1, 0, 3)]))
    assert_same_bits(verify, tuple(result[36:43] for result in together))


def test_small_steps_wake_no_thread_and_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = build(production_cases()[0])
    together = run(inputs)
    for work in (0, 1000, 2**20, 2**62):
        monkeypatch.setattr(native_build, "WORK_PER_THREAD", work)
        assert_same_bits(run(inputs), together)


def test_a_run_repeats_itself() -> None:
    inputs = build(production_cases()[0])
    first = run(inputs)
    for _ in range(3):
        assert_same_bits(run(inputs), first)


@quick
@given(cases())
def test_plain_torch_does_not_depend_on_pages_either(case: Case) -> None:
    inputs = build(case)
    assert_same_bits(run(moved(inputs), "torch"), run(inputs, "torch"))
