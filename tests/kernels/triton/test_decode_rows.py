"""A session that decodes few rows draws the line between its two kinds of request there."""

from __future__ import annotations

import pytest
import torch

from m3_kernels.testing.cases import Case
from m3_plugin.attention.backends import KernelChoice
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
