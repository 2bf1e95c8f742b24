"""Launches of a served MiniMax-M3, one module per op: what the compile gate judges, with budgets.

A module's `variants(arch)` makes calls of meta tensors and asks the op's own `launches` for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from m3_kernels.index_pages import bytes_per_token, split_pages
from m3_kernels.paged import IndexPages, KVPages, MSACaches, Step
from m3_kernels.testing.compile_gate import LOOPS_READ, LoopBudget
from m3_kernels.work_plan import WorkPlan, allocate_work_plan

META = torch.device("meta")

# Short names of dtypes, as Triton has them.
NAMES = {
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
}

# MiniMax-M3 on one rank.
Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, TOPK = 64, 4, 128, 128, 16
PAGES, TABLE_WIDTH = 4096, 8192
# Rows of one request; of few rows, or of a prompt.
PREFILL = 512


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that is only described."""
    return torch.empty(shape, dtype=dtype, device=META)


def heads(rows: int, count: int, dim: int = HEAD_DIM) -> Tensor:
    """bf16 heads [rows, count, dim] as hosts hand them on: parts of one projection."""
    wide = meta(rows, (Q_HEADS + 3 * KV_HEADS) * dim, dtype=torch.bfloat16)
    return wide[:, : count * dim].unflatten(-1, (count, dim))


def step(requests: int) -> Step:
    """A step whose page table is as wide as a host's."""
    return Step(
        page_table=meta(requests, TABLE_WIDTH, dtype=torch.int32),
        cu_seqlens_q=meta(requests + 1, dtype=torch.int32),
        seq_lens=meta(requests, dtype=torch.int32),
    )


def plan(requests: int, query_len: int, *, blocks: int = 1000) -> WorkPlan:
    """A plan of requests of so many rows each, and of a longest context of so many blocks."""
    buffers = allocate_work_plan(
        max_reqs=requests, max_rows=requests * query_len, device=META, num_programs=528
    )
    return buffers.plan(
        num_reqs=requests,
        num_rows=requests * query_len,
        max_query_len=query_len,
        max_seq_len=blocks * PAGE_SIZE,
        page_size=PAGE_SIZE,
    )


def index_pages(dtype: torch.dtype) -> IndexPages:
    """Pages of index keys; int8 ones have their scales beside them, as hosts allocate them."""
    if dtype == torch.int8:
        width = bytes_per_token(HEAD_DIM)
        return IndexPages(*split_pages(meta(PAGES, PAGE_SIZE, width, dtype=torch.int8)))
    return IndexPages(meta(PAGES, PAGE_SIZE, HEAD_DIM, dtype=dtype))


def caches(arch: int) -> dict[str, MSACaches]:
    """A cache of bf16 and the smallest one that the chip serves, by the names of their dtypes."""
    fp8 = torch.float8_e4m3fn if arch >= 89 else torch.float8_e5m2
    found = {}
    for dtype, index_dtype in ((torch.bfloat16, torch.bfloat16), (fp8, torch.int8)):
        kv, index = kv_pages(dtype), index_pages(index_dtype)
        name = f"KV {NAMES[dtype]} index {NAMES[index_dtype]}"
        found[name] = MSACaches(
            kv.k_pages,
            kv.v_pages,
            index.index_k_pages,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            index_k_scales=index.index_k_scales,
        )
    return found


def kv_pages(dtype: torch.dtype) -> KVPages:
    """Pages of keys and values beside each other; fp8 ones have a scale each."""
    pair = meta(PAGES, PAGE_SIZE, KV_HEADS, 2 * HEAD_DIM, dtype=dtype).transpose(1, 2)
    scale = meta(1, dtype=torch.float32) if dtype.itemsize == 1 else None
    k_pages, v_pages = pair.split(HEAD_DIM, dim=-1)
    return KVPages(k_pages, v_pages, scale, scale)


def slots(rows: int) -> Tensor:
    """Where rows are stored."""
    return meta(rows, dtype=torch.int64)


def of_hopper(budgets: Mapping[str, LoopBudget], name: str, arch: int) -> LoopBudget | None:
    """The budget of a hot loop on sm_90, for which loops are read."""
    return budgets[name] if arch in LOOPS_READ else None


def tensor_cores(arch: int) -> str:
    """The instruction that products on the chip's tensor cores become."""
    return {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
