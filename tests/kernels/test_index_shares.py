"""Scans shared out over ranks: candidates of shares, merged, are what one scan chooses."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.index_merge import index_merge
from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.index_topk import BlockShare, index_candidates, share_of_rank
from m3_kernels.index_topk.traffic import break_even_tokens, shared_scan_traffic
from m3_kernels.testing.cases import Case, Inputs, all_cases, build
from m3_kernels.testing.compare import selection_faults
from tests.kernels.test_index_topk import RANKINGS, one_head, select

pytestmark = pytest.mark.usefixtures("two_threads")

BACKENDS: tuple[Backend, ...] = ("native", "torch")
EVERY_BACKEND: tuple[Backend, ...] = (*BACKENDS, "reference")
# none, int8 with scales, two planes
STORED = (None, torch.int8, PLANES_DTYPE)


def candidates(inputs: Inputs, share: BlockShare, backend: Backend) -> tuple[Tensor, Tensor]:
    """Of one rank, into buffers of garbage."""
    shape = (inputs.index_q.shape[1], inputs.index_q.shape[0], inputs.case.topk)
    return index_candidates(
        inputs.index_q,
        inputs.index_k_pages,
        share=share,
        **inputs.batch,
        **inputs.selection,
        index_k_scales=inputs.index_k_scales,
        index_k_low=inputs.index_k_low,
        out=torch.full(shape, 123456789, dtype=torch.int32),
        scores=torch.full(shape, 1e30),
        backend=backend,
    )


def merged(inputs: Inputs, shares: Sequence[BlockShare], backend: Backend) -> Tensor:
    """What all ranks choose together."""
    found = [candidates(inputs, share, backend) for share in shares]
    return index_merge(
        torch.stack([ids for ids, _ in found]),
        torch.stack([scores for _, scores in found]),
        cu_seqlens_q=inputs.cu_seqlens_q,
        seq_lens=inputs.seq_lens,
        page_size=inputs.case.page_size,
        num_local_blocks=inputs.case.num_local_blocks,
        num_init_blocks=inputs.case.num_init_blocks,
        backend=backend,
    )


def even_shares(inputs: Inputs, ranks: int) -> list[BlockShare]:
    return [
        share_of_rank(
            inputs.cu_seqlens_q,
            inputs.seq_lens,
            page_size=inputs.case.page_size,
            rank=rank,
            ranks=ranks,
        )
        for rank in range(ranks)
    ]


def shares_between(cuts: Sequence[int], inputs: Inputs) -> list[BlockShare]:
    """Shares of a single request, the last one without an end."""
    assert inputs.seq_lens.numel() == 1
    edges = [0, *sorted(cuts), 2**30]
    return [BlockShare(number(first), number(end)) for first, end in pairwise(edges)]


def number(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(-1, 700), st.integers(0, 3)), max_size=6),
    page_size=st.sampled_from([1, 16, 128]),
    ranks=st.integers(1, 9),
)
def test_shares_hold_every_block_once_and_are_even(
    requests: list[tuple[int, int]], page_size: int, ranks: int
) -> None:
    starts = torch.tensor([0, *(rows for _, rows in requests)]).cumsum(0).int()
    lengths = torch.tensor([seq_len for seq_len, _ in requests], dtype=torch.int32)
    shares = [
        share_of_rank(starts, lengths, page_size=page_size, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for request, (seq_len, rows) in enumerate(requests):
        ranges = [range(int(s.first[request]), int(s.end[request])) for s in shares]
        blocks = max(0, -(-seq_len // page_size)) if rows else 0
        assert [block for share in ranges for block in share] == list(range(blocks))
    sizes = [int((share.end - share.first).sum()) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_must_be_one_of_them() -> None:
    with pytest.raises(ValueError, match=r"rank must be from 0 to 1, .*; got 2"):
        share_of_rank(torch.tensor([0, 1]), number(5), page_size=1, rank=2, ranks=2)


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_ranks_choose_what_one_does(case: Case, stored: torch.dtype | None, ranks: int) -> None:
    """To the bit, where the backend promises bits."""
    inputs = build(dataclasses.replace(case, index_dtype=stored))
    shares = even_shares(inputs, ranks)
    expected = select(inputs, "native")
    assert torch.equal(merged(inputs, shares, "native"), expected)
    plain = merged(inputs, shares, "torch")
    if stored == PLANES_DTYPE:
        assert torch.equal(plain, expected)
    assert selection_faults(plain, select(inputs, "reference"), inputs) == []


@pytest.mark.parametrize("case", all_cases()[:6], ids=lambda case: case.name)
def test_the_reference_does_too(case: Case) -> None:
    inputs = build(case)
    assert torch.equal(
        merged(inputs, even_shares(inputs, 3), "reference"), select(inputs, "reference")
    )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("cuts", [(), (1,), (2, 2), (1, 3, 4), (0, 5, 6, 9)], ids=str)
@pytest.mark.parametrize(("scores", "rules", "expected"), RANKINGS)
def test_ranking(
    scores: list[float],
    rules: dict[str, int],
    expected: list[int],
    cuts: tuple[int, ...],
    backend: Backend,
) -> None:
    """Ties, NaN, infinities and forced blocks, wherever shares end; some hold nothing."""
    inputs = one_head(scores, **rules)
    assert merged(inputs, shares_between(cuts, inputs), backend)[0, 0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.tuples(st.integers(0, 300), st.integers(1, 20)),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    topk=st.integers(1, 12),
    num_local_blocks=st.integers(0, 3),
    num_init_blocks=st.integers(0, 3),
    stored=st.sampled_from(STORED),
    holes=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_scores_full_of_ties_and_nan(
    lengths: tuple[int, int],
    cuts: list[int],
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
    stored: torch.dtype | None,
    holes: float,
    seed: int,
) -> None:
    case = Case(
        "ties",
        (lengths,),
        page_size=8,
        topk=topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        index_dtype=stored,
        seed=seed,
    )
    inputs = build(case)
    inputs.index_q.copy_(inputs.index_q.clamp(-1, 1).round())
    generator = torch.Generator().manual_seed(seed)
    if stored is None:
        # small integers: few different scores, and all of them exact in any order of summation
        inputs.index_k_pages.copy_(inputs.index_k_pages.clamp(-1, 1).round())
        nan = torch.rand(inputs.index_k_pages.shape[:2], generator=generator) < holes
        inputs.index_k_pages[nan] = math.nan
    else:
        assert inputs.index_k_scales is not None
        nan = torch.rand(inputs.index_k_scales.shape, generator=generator) < holes
        inputs.index_k_pages.copy_(inputs.index_k_pages // 64)
        if inputs.index_k_low is not None:
            inputs.index_k_low.copy_(inputs.index_k_low // 64)
        inputs.index_k_scales.copy_(torch.where(nan, math.nan, 1.0))
    shares = shares_between(cuts, inputs)
    expected = select(inputs, "reference")
    for backend in EVERY_BACKEND:
        assert torch.equal(merged(inputs, shares, backend), expected), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_blocks_of_others_are_not_read(stored: torch.dtype | None, backend: Backend) -> None:
    """Their pages have numbers that no pool has; a rank whose share is empty reads nothing."""
    inputs = build(Case("share", ((700, 3), (40, 1), (500, 2)), index_dtype=stored, topk=3))
    share = BlockShare(
        torch.tensor([7, 0, 30], dtype=torch.int32), torch.tensor([20, 0, 90], dtype=torch.int32)
    )
    expected = candidates(inputs, share, backend)
    table = inputs.page_table
    block = torch.arange(table.shape[1])
    own = (block >= share.first[:, None]) & (block < share.end[:, None])
    poisoned = dataclasses.replace(inputs, page_table=torch.where(own, table, 2**30).int())
    ids, scores = candidates(poisoned, share, backend)
    assert torch.equal(ids, expected[0])
    assert torch.equal(scores, expected[1])
    assert (ids[:, 3] == -1).all()
    assert (scores[:, 3] == -math.inf).all()
    assert (ids[:, :3] >= 7).all()
    assert (ids[:, :3] < 20).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_outside_the_pool_is_refused(backend: Backend) -> None:
    inputs = build(Case("outside", ((700, 1),), topk=3))
    inputs.page_table[0, 9] = 2**30
    with pytest.raises(IndexError):
        candidates(inputs, BlockShare(number(9), number(10)), backend)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_scores_are_those_of_one_scan(stored: torch.dtype | None, rows: int) -> None:
    """To the bit: a block of equal rank on another rank is a tie there, too."""
    case = Case("bits", ((1500, rows), (333, rows)), index_dtype=stored, dtype=torch.bfloat16)
    inputs = build(case)
    whole = index_scores(inputs)
    for share in even_shares(inputs, 3):
        ids, scores = candidates(inputs, share, "native")
        chosen = ids >= 0
        assert torch.equal(scores[chosen], whole.gather(-1, ids.long().clamp_min(0))[chosen])


def index_scores(inputs: Inputs) -> Tensor:
    """Every block's score [heads, rows, blocks], from calls which keep one block each."""
    blocks = inputs.page_table.shape[1]
    heads, rows = inputs.index_q.shape[1], inputs.index_q.shape[0]
    found = torch.full((heads, rows, blocks), -math.inf)
    alone = dataclasses.replace(inputs, case=dataclasses.replace(inputs.case, topk=1))
    requests = inputs.seq_lens.numel()
    for block in range(blocks):
        first = torch.full((requests,), block, dtype=torch.int32)
        ids, scores = candidates(alone, BlockShare(first, first + 1), "native")
        assert ((ids == block) | (ids == -1)).all()
        found[:, :, block] = scores[..., 0]
    return found


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.integers(1, 5),
    topk=st.integers(1, 9),
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=3),
    padding=st.integers(0, 3),
    num_local_blocks=st.integers(0, 4),
    num_init_blocks=st.integers(0, 4),
    seed=st.integers(0, 10_000),
)
def test_merges_agree(
    ranks: int,
    topk: int,
    lengths: list[tuple[int, int]],
    padding: int,
    num_local_blocks: int,
    num_init_blocks: int,
    seed: int,
) -> None:
    """On candidates in no order, of views, with rows before position 0 and padding."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *(rows for _, rows in lengths)]).cumsum(0).int()
    rows, heads = int(starts[-1]) + padding, 2
    order = torch.rand(heads, rows, ranks * topk, generator=generator).argsort(dim=-1).int()
    ids = torch.where(torch.rand(order.shape, generator=generator) < 0.3, -1, order)
    values = torch.tensor([math.nan, -math.inf, -1.0, -0.0, 0.0, 1.0, math.inf])
    scores = values[torch.randint(0, len(values), order.shape, generator=generator)]

    def by_rank(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (ranks, topk)).permute(2, 0, 1, 3)

    def merge(backend: Backend) -> Tensor:
        return index_merge(
            by_rank(ids),
            by_rank(scores),
            cu_seqlens_q=starts,
            seq_lens=torch.tensor([n for n, _ in lengths], dtype=torch.int32),
            page_size=2,
            num_local_blocks=num_local_blocks,
            num_init_blocks=num_init_blocks,
            out=torch.full((heads, rows, topk), 123456789, dtype=torch.int32),
            backend=backend,
        )

    expected = merge("reference")
    assert torch.equal(merge("native"), expected)
    assert torch.equal(merge("torch"), expected)


def test_no_kernel_on_a_gpu_scans_a_share() -> None:
    from m3_kernels.index_merge import INDEX_MERGE
    from m3_kernels.index_topk import INDEX_CANDIDATES

    for op in (INDEX_CANDIDATES, INDEX_MERGE):
        with pytest.raises(NotImplementedError, match="has no 'triton' implementation"):
            op.bound("triton")


def test_wrong_arguments_are_refused_by_name() -> None:
    inputs = build(Case("wrong", ((100, 1),)))
    two = BlockShare(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"share.first must be \[R\]"):
        candidates(inputs, two, "native")
    with pytest.raises(TypeError, match=r"share.end must be"):
        BlockShare(number(0), number(0).long())
    ids, scores = candidates(inputs, even_shares(inputs, 1)[0], "native")
    arguments: dict[str, Any] = {
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "seq_lens": inputs.seq_lens,
        "page_size": inputs.case.page_size,
    }
    with pytest.raises(TypeError, match="ids must be"):
        index_merge(ids[None].long(), scores[None], **arguments)
    with pytest.raises(ValueError, match="scores must be"):
        index_merge(ids[None], scores[None, :1], **arguments)
    with pytest.raises(ValueError, match="page_size must be at least 1; got 0"):
        index_merge(ids[None], scores[None], **{**arguments, "page_size": 0})
    rows_beyond = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise"):
        index_merge(
            ids[None],
            scores[None],
            **{**arguments, "cu_seqlens_q": rows_beyond},
            backend="native",
        )


# MiniMax-M3's
GEOMETRY = {"num_index_heads": 4, "index_dim": 128, "hidden_size": 6144}
TOKEN_BYTES = {"bf16": 256, "int8": 130, "planes": 130}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_what_sharing_saves(ranks: int) -> None:
    """Ranks read every key once together; at the break-even point the time saved is that spent."""
    tokens = 128 * 1000
    traffic = shared_scan_traffic(tokens, rows=3, ranks=ranks, topk=16, token_bytes=256, **GEOMETRY)
    assert ranks * (tokens * 256 - traffic.saved) == tokens * 256
    # an id and a score of each candidate, of all heads
    assert traffic.received == (4 + 4) * 16 * 4 * 3 * (ranks - 1)
    assert traffic.projected == (4 - 4 // min(ranks, 4)) * 128 * 6144 * 2
    even = break_even_tokens(
        ranks=ranks, token_bytes=256, bytes_per_second=4.8e12, exchange_seconds=8e-6, **GEOMETRY
    )
    at = shared_scan_traffic(even, rows=3, ranks=ranks, topk=16, token_bytes=256, **GEOMETRY)
    spent = 8e-6 + at.projected / 4.8e12
    assert at.saved / 4.8e12 == pytest.approx(spent, rel=1e-4)


def test_the_table_of_the_page_is_the_model() -> None:
    text = (Path(__file__).parents[2] / "docs" / "index-sharing.md").read_text()
    row = r"\| .*?, ([\d.]+) (TB|GB)/s \| (\d+) µs \| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|"
    rows = re.findall(row, text)
    assert len(rows) == 5
    for bandwidth, unit, exchange, keys, *said in rows:
        found = [
            break_even_tokens(
                ranks=ranks,
                token_bytes=TOKEN_BYTES[keys],
                bytes_per_second=float(bandwidth) * {"TB": 1e12, "GB": 1e9}[unit],
                exchange_seconds=float(exchange) * 1e-6,
                **GEOMETRY,
            )
            for ranks in (2, 4, 8)
        ]
        assert [f"{tokens:,}" for tokens in found] == said
