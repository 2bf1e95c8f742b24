"""Checked steps: each rule broken by hand is named, and what is whole passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.checks import StepChecker, StepCheckError
from m3_plugin.attention.session import MSAPlan, MSASession
from m3_plugin.model.config import MSAConfig

PAGE = 128
PAGES = 40
HEADS, GROUPS, DIM = 8, 4, 128


class _Session(MSASession):
    """Lets a test spoil what the kernels give."""

    ids = staticmethod(lambda ids: ids)
    result = staticmethod(lambda out: out)

    def select(self, plan: MSAPlan, index_q: Tensor, *, caches: MSACaches) -> Tensor:
        return self.ids(super().select(plan, index_q, caches=caches))

    def attend(
        self, plan: MSAPlan, q: Tensor, block_ids: Tensor, *, caches: MSACaches, out: Tensor
    ) -> None:
        super().attend(plan, q, block_ids.clamp(min=-1), caches=caches, out=out)
        self.result(out)


@pytest.fixture
def session() -> _Session:
    msa = MSAConfig(
        num_index_heads=GROUPS,
        index_dim=DIM,
        block_size=PAGE,
        topk_blocks=3,
        num_init_blocks=0,
        num_local_blocks=1,
    )
    session = _Session(msa, kernels=KernelChoice("torch", "for a test"), scale=DIM**-0.5)
    session.checker = StepChecker(1, msa)
    return session


@pytest.fixture
def caches() -> MSACaches:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(PAGES, GROUPS, PAGE, DIM, generator=generator) for _ in range(2))
    return MSACaches(k, v, torch.randn(PAGES, PAGE, DIM, generator=generator))


def batch() -> MSABatch:
    """One request that decodes at 700 tokens and one with 5 new ones behind a shared first page."""
    table = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 9, 10, -7, 99, 99]], dtype=torch.int32)
    rows = [(0, 699), *((1, position) for position in range(295, 300))]
    slots = [int(table[r, p // PAGE]) * PAGE + p % PAGE for r, p in rows]
    return MSABatch(
        cu_seqlens_q=torch.tensor([0, 1, 6], dtype=torch.int32),
        seq_lens=torch.tensor([700, 300], dtype=torch.int32),
        page_table=table,
        slot_mapping=torch.tensor(slots),
        max_query_len=5,
        max_seq_len=700,
        requests=("first", "second"),
    )


def run(
    session: MSASession,
    step: MSABatch,
    caches: MSACaches,
    *,
    q: Tensor | None = None,
    plan: MSAPlan | None = None,
) -> None:
    rows = step.slot_mapping.shape[0]
    one = torch.ones(DIM)
    session.run(
        plan or session.plan(step),
        torch.randn(rows, HEADS, DIM) if q is None else q,
        torch.randn(rows, GROUPS, DIM),
        torch.randn(rows, GROUPS, DIM),
        torch.randn(rows, GROUPS, DIM),
        torch.randn(rows, DIM),
        norms=HeadNorms(one, one, one, one, 1e-6),
        cos_sin=torch.cat([torch.ones(rows, 32), torch.zeros(rows, 32)], dim=1),
        caches=caches,
        out=torch.empty(rows, HEADS, DIM),
    )


def changed(name: str, *at: int, to: int) -> MSABatch:
    step = batch()
    values = getattr(step, name).clone()
    values[at] = to
    return replace(step, **{name: values})


def test_a_whole_step_passes(session: _Session, caches: MSACaches) -> None:
    run(session, batch(), caches)


def test_a_rehearsal_is_not_looked_at(session: _Session, caches: MSACaches) -> None:
    """Hosts warm up with pages of nobody, and store nothing."""
    step = replace(batch(), page_table=torch.zeros(2, 6, dtype=torch.int32))
    run(session, replace(step, slot_mapping=torch.full((6,), -1)), caches)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (changed("page_table", 0, 2, to=PAGES), r"'first'.*block 2 has page 40, the pool has 40"),
        (changed("page_table", 1, 1, to=-1), r"'second'.*block 1 has page -1"),
        (changed("page_table", 0, 2, to=4), r"'first'.*page 4 is its block"),
        (changed("page_table", 1, 1, to=7), r"page 7 is its block"),
        (changed("slot_mapping", 3, to=5), r"'second'.*position 297 is stored at slot 5"),
        (changed("slot_mapping", 0, to=PAGES * PAGE), r"'first'.*position 699 is stored at"),
        (changed("seq_lens", 0, to=900), r"'first'.*has 900 keys in 6 pages"),
        (changed("seq_lens", 1, to=3), r"'second'.*has 5 rows and 3 keys"),
        (changed("cu_seqlens_q", 2, to=7), r"the step: rows of requests must ascend"),
        (changed("cu_seqlens_q", 1, to=-1), r"the step: rows of requests must ascend"),
    ],
)
def test_a_wrong_step_is_named_before_it_stores(
    session: _Session, caches: MSACaches, step: MSABatch, said: str
) -> None:
    before = caches.k_pages.clone()
    with pytest.raises(StepCheckError, match=said):
        run(session, step, caches)
    assert torch.equal(caches.k_pages, before)


def _spoiled(row: int, *ids: int) -> object:
    def spoil(block_ids: Tensor) -> Tensor:
        block_ids[1, row] = torch.tensor(ids, dtype=torch.int32)
        return block_ids

    return spoil


@pytest.mark.parametrize(
    "ids", [(2, 1, 5), (1, 1, 5), (0, 1, 6), (0, 5, -1), (-1, 0, 5), (0, 1, 2)]
)
def test_a_wrong_selection_is_named(
    session: _Session, caches: MSACaches, ids: tuple[int, ...]
) -> None:
    """Out of order, twice, beyond the newest, too few, a gap, without the newest."""
    session.ids = _spoiled(0, *ids)  # type: ignore[assignment]
    with pytest.raises(StepCheckError, match=r"'first'.*group 1 at position 699 chose"):
        run(session, batch(), caches)


def test_a_gap_is_named_where_fewer_blocks_are_wanted(session: _Session, caches: MSACaches) -> None:
    """Two of three places, of which the empty one must be the last."""
    step = MSABatch(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([200], dtype=torch.int32),
        page_table=torch.tensor([[3, 4]], dtype=torch.int32),
        slot_mapping=torch.tensor([4 * PAGE + 199 - PAGE]),
        max_query_len=1,
        max_seq_len=200,
        requests=("short",),
    )
    run(session, step, caches)
    session.ids = _spoiled(0, 0, -1, 1)  # type: ignore[assignment]
    with pytest.raises(StepCheckError, match=r"'short'.*group 1 at position 199 chose"):
        run(session, step, caches)


def test_results_that_are_not_finite_are_traced(session: _Session, caches: MSACaches) -> None:
    q = torch.randn(6, HEADS, DIM)
    q[2, 0, 0] = torch.nan
    with pytest.raises(StepCheckError, match=r"'second'.*position 296.*query was not either"):
        run(session, batch(), caches, q=q)
    caches.v_pages[8, 0, 5] = torch.inf
    with pytest.raises(StepCheckError, match=r"'first'.*page 8, its block 5, holds NaN"):
        run(session, batch(), caches)
    caches.v_pages[8, 0, 5] = 0
    session.result = lambda out: out[5].fill_(torch.nan)  # type: ignore[assignment]
    with pytest.raises(StepCheckError, match=r"'second'.*position 299.*are: the kernels"):
        run(session, batch(), caches)


def test_what_the_model_gives_is_traced_to_its_request(
    session: _Session, caches: MSACaches
) -> None:
    """Of layers behind the last MSA layer, which no layer of ours sees; padding is nobody's."""
    checker = session.checker
    assert checker is not None
    hidden = torch.randn(8, 16)
    hidden[6:] = torch.nan
    run(session, batch(), caches)
    checker.end(hidden)
    hidden[4, 3] = -torch.inf
    # a step without layers of ours, as a rehearsal of the host's: rows of another step say nothing
    checker.end(hidden)
    run(session, batch(), caches)
    with pytest.raises(
        StepCheckError, match=r"step 1, behind the last layer.*'second'.*position 298 is not finite"
    ):
        checker.end(hidden)
    session.checker = StepChecker(2, session.msa)
    for looked_at in (True, False):
        run(session, batch(), caches)
        if not looked_at:
            session.checker.end(hidden)


def test_only_every_nth_step_is_looked_at(session: _Session, caches: MSACaches) -> None:
    session.checker = StepChecker(3, session.msa)
    wrong = changed("page_table", 0, 2, to=4)
    run(session, batch(), caches)
    run(session, wrong, caches)
    run(session, wrong, caches)
    with pytest.raises(StepCheckError, match="step 3"):
        run(session, wrong, caches)


def test_a_step_that_changes_in_place_is_looked_at_again(
    session: _Session, caches: MSACaches
) -> None:
    """As a draft's does: the next token begins another block."""
    step = batch()
    table = step.page_table[:1]
    drafting = MSABatch(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([640], dtype=torch.int32),
        page_table=table,
        slot_mapping=torch.tensor([7 * PAGE + 127]),
        max_query_len=1,
        max_seq_len=700,
    )
    plan = session.plan(drafting)
    run(session, drafting, caches, plan=plan)
    drafting.seq_lens.add_(1)
    drafting.slot_mapping[0] = 8 * PAGE
    session.replan(plan)
    run(session, drafting, caches, plan=plan)
    drafting.seq_lens.add_(1)
    session.replan(plan)
    with pytest.raises(StepCheckError, match=f"stored at slot {8 * PAGE}"):
        run(session, drafting, caches, plan=plan)


def test_padding_passes(session: _Session, caches: MSACaches) -> None:
    """A padded request has no rows; a padded row stores nothing."""
    step = batch()
    padded = MSABatch(
        cu_seqlens_q=torch.tensor([0, 1, 6, 6], dtype=torch.int32),
        seq_lens=torch.tensor([700, 300, 0], dtype=torch.int32),
        page_table=torch.cat([step.page_table, torch.full((1, 6), 3, dtype=torch.int32)]),
        slot_mapping=torch.cat([step.slot_mapping, torch.tensor([-1, -1])]),
        max_query_len=5,
        max_seq_len=700,
    )
    run(session, padded, caches)
