"""A session that decodes few rows draws the line between its two kinds of request there."""

from __future__ import annotations

import pytest
import torch

from m3_kernels.testing.cases import Case
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.self_test import session_for, verify_case

CPU = torch.device("cpu")
# One row, a few, and many, beyond the two blocks a row may read.
CASE = Case(
    "mixed", ((70, 1), (50, 3), (37, 6), (20, 9)), page_size=16, topk=2, dtype=torch.float16
)
TRITON = KernelChoice("triton", "test")


@pytest.mark.parametrize("decode_rows", [1, 4])
def test_rows_of_either_kind_are_right(decode_rows: int) -> None:
    findings = verify_case(CASE, kernels=TRITON, device=CPU, decode_rows=decode_rows)
    assert {f.quantity: f.faults for f in findings} == {
        "queries": (),
        "cache": (),
        "selection": (),
        "attention": (),
        "run": (),
    }


def test_scratch_shrinks_with_it() -> None:
    def scratch(decode_rows: int) -> int:
        workspace = session_for(CASE, kernels=TRITON, device=CPU, decode_rows=decode_rows).workspace
        assert workspace is not None
        return workspace.scratch.attention.partial.numel()

    assert 4 * scratch(1) <= scratch(4) * 2 <= scratch(8)


def test_a_step_is_planned_again_where_its_lengths_have_changed() -> None:
    """What a graph of all draft steps holds between them; the same as a plan made afresh."""
    draft, fresh = (
        session_for(CASE, kernels=TRITON, device=CPU, decode_rows=1, max_seq_len=512)
        for _ in range(2)
    )
    batch = MSABatch(
        cu_seqlens_q=torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        seq_lens=torch.tensor([16, 200, 32], dtype=torch.int32),
        page_table=torch.zeros(3, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(3, dtype=torch.int64),
        max_query_len=1,
        max_seq_len=512,
    )
    plan = draft.plan(batch)
    assert plan.work is not None
    before = plan.work.cum_blocks.clone()
    batch.seq_lens.add_(1)
    draft.replan(plan)
    assert not torch.equal(plan.work.cum_blocks, before)
    expected = fresh.plan(batch).work
    for name, value in vars(plan.work).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(expected, name)), name
