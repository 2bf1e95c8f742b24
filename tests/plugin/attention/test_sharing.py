"""Scans shared out over ranks: what all ranks give together is what one gives, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3_kernels.index_pages import PLANES_DTYPE, channels, views_of
from m3_kernels.paged import MSACaches
from m3_plugin.attention.assembly import make_session
from m3_plugin.attention.backends import choose_kernels
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.sharing import IndexSharing, index_heads_of_rank, make_sharing
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_plugin.settings import Settings
from tests.plugin.attention.test_session import (
    DIM,
    HEADS,
    KV_HEADS,
    NORMS,
    PAGE,
    angles,
    inputs,
    msa,
)

# (request, rows) of each step: prompts, decoding, drafts verified, a mix, a request of one block
STEPS = (
    ((0, 1400), (1, 60)),
    ((0, 1), (1, 1)),
    ((0, 4), (1, 2)),
    ((0, 1), (1, 700)),
    ((0, 1), (1, 1)),
    ((1, 3),),
)
PAGES = 24


class Meeting:
    """An exchange between threads that stand for ranks; counts how often they met."""

    def __init__(self, ranks: int) -> None:
        self.parts: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.count = 0

    def gather_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(part: Tensor) -> Tensor:
            self.parts[rank] = part
            if self.barrier.wait() == 0:
                self.count += 1
            found = torch.cat([part for part in self.parts if part is not None])
            self.barrier.wait()
            return found

        return gather


def caches_of(kv_heads: int, index_dtype: torch.dtype) -> MSACaches:
    packed = torch.full((PAGES, kv_heads, PAGE, 2 * DIM), torch.nan)
    k_pages, v_pages = packed.split(DIM, dim=-1)
    index = views_of(torch.zeros(PAGES, PAGE, channels(DIM, index_dtype), dtype=index_dtype))
    return MSACaches(
        k_pages,
        v_pages,
        index.keys,
        index_k_scales=index.scales,
        index_k_low=index.low,
    )


def batch_of(
    rows: tuple[tuple[int, int], ...], stored: dict[int, int]
) -> tuple[MSABatch, list[slice]]:
    """The step, and which rows of each request's sequence it holds; `stored` is counted up."""
    tables = torch.randperm(PAGES, generator=torch.Generator().manual_seed(3)).int().view(2, -1)
    slots, lengths, counts, taken = [], [], [], []
    for request, count in rows:
        positions = torch.arange(stored[request], stored[request] + count)
        slots.append(tables[request][positions // PAGE].long() * PAGE + positions % PAGE)
        taken.append(slice(stored[request], stored[request] + count))
        stored[request] += count
        lengths.append(stored[request])
        counts.append(count)
    batch = MSABatch(
        cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        page_table=tables[[request for request, _ in rows]],
        slot_mapping=torch.cat(slots),
        max_query_len=max(counts),
        max_seq_len=max(lengths),
    )
    return batch, taken


def served(
    rank: int, ranks: int, index_dtype: torch.dtype, sharing: IndexSharing | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and chosen blocks of each step on one rank, which has its part of all heads."""
    session = MSASession(msa(), kernels=choose_kernels("cpu"), scale=DIM**-0.5, sharing=sharing)
    chosen: list[Tensor] = []

    class Recorder:
        def add(self, block_ids: Tensor, *, batch: MSABatch) -> None:
            chosen.append(block_ids.clone())

    session.recorder = Recorder()  # pyright: ignore[reportAttributeAccessIssue]
    own = index_heads_of_rank(KV_HEADS, rank=rank, ranks=ranks)
    group = HEADS // KV_HEADS
    own_q = slice(own.start * group, own.stop * group)
    caches = caches_of(own.stop - own.start, index_dtype)
    sequences = [inputs(2200), inputs(2100)]
    stored, outs = {0: 0, 1: 0}, []
    for step in STEPS:
        batch, taken = batch_of(step, stored)
        q, k, v, index_q, index_k = (
            torch.cat([sequences[r][i][rows] for (r, _), rows in zip(step, taken, strict=True)])
            for i in range(5)
        )
        out = torch.full((len(q), (own.stop - own.start) * group, DIM), torch.nan)
        session.run(
            session.plan(batch),
            q[:, own_q],
            k[:, own],
            v[:, own],
            index_q if sharing is not None else index_q[:, own],
            index_k,
            norms=NORMS,
            cos_sin=torch.cat([angles(rows.start, rows.stop) for rows in taken]),
            caches=caches,
            out=out,
        )
        outs.append(out)
    return outs, chosen


@pytest.mark.parametrize("index_dtype", [torch.float32, torch.int8, PLANES_DTYPE], ids=str)
@pytest.mark.parametrize(
    ("ranks", "from_tokens", "meetings"), [(2, 0, 4), (4, 0, 4), (8, 0, 4), (2, 2200, 3)]
)
def test_ranks_choose_and_give_what_one_does(
    ranks: int, from_tokens: int, meetings: int, index_dtype: torch.dtype
) -> None:
    """In steps of decoding and verification, below the bound and with prompts each for itself."""
    one = served(0, 1, index_dtype, None)
    meeting = Meeting(ranks)

    def run(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        gather = meeting.gather_of(rank)
        sharing = IndexSharing(
            rank, ranks, num_index_heads=KV_HEADS, gather=gather, from_tokens=from_tokens
        )
        return served(rank, ranks, index_dtype, sharing)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(run, range(ranks)))
    assert meeting.count == meetings
    copies = max(1, ranks // KV_HEADS)
    for step in range(len(STEPS)):
        outs = torch.cat([out[step] for out, _ in found[::copies]], dim=1)
        chosen = torch.cat([ids[step] for _, ids in found[::copies]])
        assert torch.equal(chosen, one[1][step])
        assert torch.equal(outs, one[0][step])
        for copy in range(copies):
            assert torch.equal(torch.cat([ids[step] for _, ids in found[copy::copies]]), chosen)


def test_lengths_that_change_in_place_are_shared_anew() -> None:
    """As drafting changes them, between steps of one plan."""
    sharing = IndexSharing(1, 2, num_index_heads=KV_HEADS, gather=torch.clone, from_tokens=0)
    session = MSASession(msa(), kernels=choose_kernels("cpu"), scale=1.0, sharing=sharing)
    batch, _ = batch_of(((0, 1),), {0: 1000, 1: 0})
    plan = session.plan(batch)
    assert plan.share is not None
    first, end = plan.share.first, plan.share.end
    assert (int(first), int(end)) == (4, 8)
    batch.seq_lens.fill_(1300)
    session.replan(plan)
    assert (int(first), int(end)) == (5, 11)


def test_the_bound_is_of_the_host() -> None:
    """All ranks must decide alike, and none may ask a device."""
    sharing = IndexSharing(0, 2, num_index_heads=KV_HEADS, gather=torch.clone, from_tokens=2048)
    batch, _ = batch_of(((0, 1), (1, 1)), {0: 1000, 1: 10})
    batch.seq_lens.fill_(10**6)
    assert not sharing.takes(batch)
    assert sharing.takes(replace(batch, max_seq_len=1024))
    assert not sharing.takes(replace(batch, max_seq_len=1024, max_query_len=9))


def scan(**changes: object) -> Settings:
    return replace(Settings(index_sharing="scan", index_sharing_from=5), **changes)


def test_nothing_is_shared_unless_asked_or_by_one_rank() -> None:
    gather = torch.clone
    assert make_sharing(msa(), Settings(), rank=0, ranks=2, gather=gather) is None
    assert make_sharing(msa(), scan(), rank=0, ranks=1, gather=gather) is None
    made = make_sharing(msa(), scan(), rank=1, ranks=2, gather=gather)
    assert made is not None
    assert (made.own_heads, made.from_tokens) == (slice(2, 4), 5)
    with pytest.raises(ValueError, match="needs an exchange"):
        make_sharing(msa(), scan(), rank=0, ranks=2, gather=None)


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, (0, 4)), (2, (2, 4)), (4, (3, 4)), (8, (3, 4))]
)
def test_heads_of_the_last_rank(ranks: int, expected: tuple[int, int]) -> None:
    assert index_heads_of_rank(4, rank=ranks - 1, ranks=ranks) == slice(*expected)


def test_kernels_of_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("M3_PLUGIN_KERNELS", "triton")
    monkeypatch.setenv("M3_PLUGIN_INDEX_SHARING", "scan")
    with pytest.raises(ValueError, match="M3_PLUGIN_INDEX_SHARING=scan: no kernel on a GPU"):
        make_session(
            M3Config.from_hf(released_config()),
            device=torch.device("cpu"),
            dtype=torch.float32,
            cache_dtype=torch.float32,
            index_dtype=torch.float32,
            tensor_parallel_size=2,
            gather=torch.clone,
            capacity=StepCapacity(max_requests=1, max_rows=1, max_seq_len=128),
        )
