"""The Triton kernels of `index_topk` in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3_kernels.index_topk import index_topk
from m3_kernels.testing.cases import Case, Inputs, all_cases, build
from m3_kernels.testing.compare import selection_faults

# The interpreter computes with bf16 as if its bits were an integer.
CASES = [case for case in all_cases() if case.dtype != torch.bfloat16]


def run(inputs: Inputs, *, use_descriptors: bool = False, **changes: object) -> Tensor:
    """The kernels into a buffer of garbage."""
    from m3_kernels.index_topk.triton import index_topk_triton

    case = inputs.case
    heads, rows = inputs.index_q.shape[1], inputs.index_q.shape[0]
    arguments: dict[str, object] = {
        **inputs.batch,
        "num_local_blocks": case.num_local_blocks,
        "num_init_blocks": case.num_init_blocks,
        "out": torch.full((heads, rows, case.topk), 123456789, dtype=torch.int32),
        "use_descriptors": use_descriptors,
        **changes,
    }
    index_topk_triton(inputs.index_q, inputs.index_k_pages, **arguments)  # pyright: ignore[reportArgumentType]
    out = arguments["out"]
    assert isinstance(out, Tensor)
    return out


def reference(inputs: Inputs) -> Tensor:
    return index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        backend="reference",
    )


@pytest.mark.parametrize("use_descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, use_descriptors: bool) -> None:
    inputs = build(case)
    ids = run(inputs, use_descriptors=use_descriptors)
    assert selection_faults(ids, reference(inputs), inputs) == []
