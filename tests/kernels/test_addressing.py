"""Page id times stride goes beyond 32 bits in real pools, and workspaces stay bounded."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from m3_kernels.cache_store import cache_store
from m3_kernels.capability import Backend
from m3_kernels.index_topk import index_topk
from m3_kernels.sparse_attention import sparse_attention
from m3_kernels.testing.cases import Case, build

EVERY_BACKEND: tuple[Backend, ...] = ("native", "torch", "reference")
FAR_PAGE = 2**20


def far_pool(pages: Tensor) -> Tensor:
    """A pool of 2**20 + n pages whose last n lie more than 2**31 elements from its start.

    The memory in between is reserved, not touched.
    """
    per_page = pages[0].numel()
    assert FAR_PAGE * per_page > 2**31
    reserved = torch.empty((FAR_PAGE + pages.shape[0]) * per_page, dtype=pages.dtype)
    pool = reserved.view(-1, *pages.shape[1:])
    pool[FAR_PAGE:] = pages
    return pool


def far_heads(pages: Tensor) -> Tensor:
    """A pool whose heads lie 2**30 elements apart, one after another; four of them are enough."""
    num_pages, heads, *rest = pages.shape
    assert heads > 2
    reserved = torch.empty((heads, 2**30 // pages[0, 0].numel(), *rest), dtype=pages.dtype)
    pool = reserved.transpose(0, 1)[:num_pages]
    pool.copy_(pages)
    return pool


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_addresses_beyond_32_bits(backend: Backend) -> None:
    case = Case("far", ((60, 3),), num_q_heads=4, head_dim=128, index_dim=136, dtype=torch.float16)
    near = build(case)
    far = dataclasses.replace(
        near,
        k_pages=far_pool(near.k_pages),
        v_pages=far_pool(near.v_pages),
        index_k_pages=far_pool(near.index_k_pages),
        page_table=near.page_table.where(near.page_table < 0, near.page_table + FAR_PAGE),
    )
    results = []
    for inputs in (near, far):
        ids = index_topk(
            inputs.index_q,
            inputs.index_k_pages,
            **inputs.batch,
            **inputs.selection,
            backend=backend,
        )
        out = sparse_attention(
            inputs.q,
            inputs.k_pages,
            inputs.v_pages,
            ids,
            **inputs.batch,
            scale=inputs.scale,
            backend=backend,
        )
        results.append((ids, out))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])

    slots = torch.where(near.slot_mapping < 0, -1, near.slot_mapping + FAR_PAGE * case.page_size)
    cache_store(
        far.k,
        far.v,
        far.index_k,
        far.k_pages,
        far.v_pages,
        far.index_k_pages,
        slot_mapping=slots,
        backend=backend,
    )
    page, offset = divmod(int(slots[1]), case.page_size)
    assert torch.equal(far.k_pages[page, :, offset], far.k[1])
    assert torch.equal(far.index_k_pages[page, offset], far.index_k[1])


PEAK_MEMORY = """
import resource, sys, torch
from m3_kernels.index_topk import index_topk
from m3_kernels.sparse_attention import sparse_attention

backend, rows, context = sys.argv[1], int(sys.argv[2]), 131072
# The sequence repeats eight pages, so that the inputs are small.
pages = torch.randn(8, 128, 128).bfloat16()
kv = torch.randn(8, 4, 128, 128).bfloat16()
batch = dict(
    page_table=torch.arange(context // 128, dtype=torch.int32)[None] % 8,
    cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32),
    seq_lens=torch.tensor([context], dtype=torch.int32),
)
q, index_q = torch.randn(rows, 64, 128).bfloat16(), torch.randn(rows, 4, 128).bfloat16()
ids, out = torch.zeros(4, rows, 16, dtype=torch.int32), torch.zeros_like(q)
ids.copy_(torch.arange(16))

def run(count, context):
    step = dict(batch, cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32))
    step["seq_lens"] = torch.tensor([context], dtype=torch.int32)
    index_topk(index_q, pages, **step, topk=16, out=ids, backend=backend)
    sparse_attention(q, kv, kv, ids, **step, scale=0.1, out=out, backend=backend)

run(1, 4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows, context)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_workspace_is_bounded_at_long_context(backend: str) -> None:
    command = [sys.executable, "-c", PEAK_MEMORY, backend, "130"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 512 * 1024  # KiB
