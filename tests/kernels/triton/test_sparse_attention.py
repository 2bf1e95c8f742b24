"""The Triton kernels of `sparse_attention`: exactness, sets, masks, NaN, and equal bits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m3_kernels.index_topk import index_topk
from m3_kernels.testing.cases import Case, Inputs, all_cases, build
from m3_kernels.testing.compare import assert_accurate, plain_attention

INT32_MIN = -(2**31)

# Programs run one after another, tens of milliseconds each: the long prefills lose some rows.
LONGEST = 17


def shortened(case: Case) -> Case:
    """The same step with fewer rows of each long request; sequences are as long as before."""
    requests = tuple(
        (cached + rows - min(rows, LONGEST), min(rows, LONGEST)) for cached, rows in case.requests
    )
    return dataclasses.replace(case, requests=requests)


CASES = [
    shortened(case)
    for case in all_cases()
    # bf16 arithmetic is wrong in the interpreter.
    if case.dtype != torch.bfloat16 and not case.name.startswith("m3")
]


def choose(inputs: Inputs) -> Tensor:
    return index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        backend="reference",
    )


def attend(inputs: Inputs, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Run the kernels into buffers of NaN; outputs and lse."""
    from m3_kernels.sparse_attention.triton import sparse_attention_triton

    rows, heads, dim = inputs.q.shape
    out = torch.full((rows, heads + 1, dim), torch.nan, dtype=inputs.q.dtype)[:, :heads]
    lse = torch.full((heads, rows), torch.nan).T
    sparse_attention_triton(
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        ids,
        **inputs.batch,
        scale=inputs.scale,
        out=out,
        lse=lse,
        **options,
    )
    return out, lse


def assert_exact(inputs: Inputs, ids: Tensor, results: tuple[Tensor, Tensor]) -> None:
    exact, exact_lse = plain_attention(inputs, ids, torch.float64)
    plain, plain_lse = plain_attention(inputs, ids, inputs.case.dtype)
    out, lse = results
    assert_accurate(out, exact, plain, what="out")
    assert_accurate(lse, exact_lse, plain_lse, what="lse")
    assert (out[exact_lse == -math.inf] == 0).all()


def rows_of(inputs: Inputs, ids: Tensor, pieces: list[tuple[int, int, int]]) -> tuple[Inputs, Any]:
    """The step of only the rows `first:last`, counted in their request, of some requests."""
    starts = inputs.cu_seqlens_q.tolist()
    rows, counts, lengths = [], [0], []
    for request, first, last in pieces:
        all_rows = starts[request + 1] - starts[request]
        rows += range(starts[request] + first, starts[request] + last)
        counts.append(last - first)
        lengths.append(int(inputs.seq_lens[request]) - (all_rows - last))
    return dataclasses.replace(
        inputs,
        q=inputs.q[rows],
        page_table=inputs.page_table[[request for request, _, _ in pieces]],
        cu_seqlens_q=torch.tensor(counts).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
    ), ids[:, rows].contiguous()


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_exact_arithmetic(case: Case) -> None:
    inputs = build(case)
    ids = choose(inputs)
    assert_exact(inputs, ids, attend(inputs, ids, arch=90, use_descriptors=False))
