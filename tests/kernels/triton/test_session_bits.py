"""A request has the same bits alone and in any batch, through a session on the Triton kernels.

What the hosts' options for this ask of attention (`VLLM_BATCH_INVARIANT`,
`--enable-deterministic-inference`). Both stay refused: see docs/gpu-audit.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.paged import MSACaches
from m3_kernels.testing.cases import Case, Inputs, build
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.self_test import session_for

# decoding, verifying, a few rows more than that, and a chunk of a prompt
CASE = Case(
    "mixed",
    ((70, 1), (50, 3), (37, 6), (20, 12)),
    num_q_heads=4,
    page_size=16,
    topk=2,
    dtype=torch.float16,
)
COMPOSITIONS = ([0], [1], [2], [3, 1])


def run(inputs: Inputs, requests: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of each of these requests, in a step of their own: chosen blocks and attention."""
    session = session_for(
        CASE, kernels=KernelChoice("triton", "test"), device=torch.device("cpu"), decode_rows=4
    )
    starts = inputs.cu_seqlens_q.tolist()
    rows = [torch.arange(starts[r], starts[r + 1]) for r in requests]
    chosen = torch.cat(rows)
    counts = [len(each) for each in rows]
    batch = MSABatch(
        cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=inputs.seq_lens[requests],
        page_table=inputs.page_table[requests],
        slot_mapping=inputs.slot_mapping[chosen],
        max_query_len=max(counts),
        max_seq_len=int(inputs.seq_lens[requests].max()),
    )
    caches = MSACaches(inputs.k_pages, inputs.v_pages, inputs.index_k_pages)
    plan = session.plan(batch)
    ids = session.select(plan, inputs.index_q[chosen], caches=caches).clone()
    out = torch.empty_like(inputs.q[chosen])
    session.attend(plan, inputs.q[chosen], ids, caches=caches, out=out)
    parts = zip(ids.split(counts, dim=1), out.split(counts), strict=True)
    return list(parts)


def test_a_request_s_bits_do_not_depend_on_the_batch() -> None:
    inputs = build(CASE)
    together = run(inputs, [0, 1, 2, 3])
    for requests in COMPOSITIONS:
        for request, (ids, out) in zip(requests, run(inputs, requests), strict=True):
            expected_ids, expected = together[request]
            assert torch.equal(ids, expected_ids), (requests, request)
            assert torch.equal(out, expected), (requests, request)
            assert out.isfinite().all()
