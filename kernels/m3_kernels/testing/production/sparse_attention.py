"""`sparse_attention`: decode, verification and prefill in the dtypes that the chip serves."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.launch import Launch
from m3_kernels.sparse_attention.call import SparseAttention
from m3_kernels.sparse_attention.triton import launches
from m3_kernels.sparse_attention.workspace import (
    allocate_sparse_attention_workspace,
    attention_config,
)
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import LoopBudget, Variant

REQUESTS = 7

# Of sm_90, with the release of Triton that needs most.
HOT_LOOPS = {
    "decode q_len 1 bf16 KV bf16": LoopBudget(
        520, 1250, barriers=5, shuffles=10, programs_per_sm=2
    ),
    "decode q_len 2 bf16 KV bf16": LoopBudget(
        540, 1400, barriers=5, shuffles=20, programs_per_sm=2
    ),
    "decode q_len 4 bf16 KV bf16": LoopBudget(
        540, 1600, barriers=5, shuffles=20, programs_per_sm=2
    ),
    "prefill bf16 KV bf16": LoopBudget(490, 1400, barriers=7, shuffles=14),
    "decode q_len 1 bf16 KV fp8e4nv": LoopBudget(
        700, 2350, conversions=64, barriers=5, shuffles=10, programs_per_sm=2
    ),
    "decode q_len 4 bf16 KV fp8e4nv": LoopBudget(
        720, 2600, conversions=64, barriers=5, shuffles=20, programs_per_sm=2
    ),
    "prefill bf16 KV fp8e4nv": LoopBudget(600, 2100, conversions=32, barriers=9, shuffles=14),
}


def variants(arch: int) -> Iterator[Variant]:
    """Both kernels, for requests of so many rows."""
    fp8 = torch.float8_e4m3fn if arch >= 89 else torch.float8_e5m2
    for dtype, lengths in ((torch.bfloat16, (1, 2, 4)), (fp8, (1, 4))):
        for query_len in lengths:
            (launch,) = launched(arch, dtype, query_len)
            yield judged(f"decode q_len {query_len}", launch, arch, dtype, query_len)
        _, launch = launched(arch, dtype, m3.PREFILL)
        yield judged("prefill", launch, arch, dtype, m3.PREFILL)


def judged(kind: str, launch: Launch, arch: int, pages: torch.dtype, query_len: int) -> Variant:
    """A kernel with all registers and the configured shared memory as its budget."""
    config = attention_config(
        f"sparse_attention_{kind.split()[0]}",
        dtype=torch.bfloat16,
        kv_dtype=pages,
        max_query_len=query_len,
        arch=arch,
    )
    described = ("UTMALDG",) if launch.arguments["USE_DESCRIPTORS"] else ()
    name = f"{kind} bf16 KV {m3.NAMES[pages]}"
    return Variant(
        name,
        launch,
        registers=255,
        shared=config["SHARED_KB"] * 1024,
        needs=(m3.tensor_cores(arch), *described),
        loop=m3.of_hopper(HOT_LOOPS, name, arch),
    )


def launched(arch: int, pages: torch.dtype, query_len: int) -> list[Launch]:
    """What a step of several requests of so many rows launches."""
    rows = REQUESTS * query_len
    call = SparseAttention(
        m3.meta(rows, m3.Q_HEADS, m3.HEAD_DIM, dtype=torch.bfloat16),
        m3.kv_pages(pages),
        m3.meta(m3.KV_HEADS, rows, m3.TOPK, dtype=torch.int32),
        m3.step(REQUESTS),
        scale=m3.HEAD_DIM**-0.5,
        out=m3.meta(rows, m3.Q_HEADS, m3.HEAD_DIM, dtype=torch.bfloat16),
        plan=m3.plan(REQUESTS, query_len),
        workspace=allocate_sparse_attention_workspace(
            max_reqs=REQUESTS,
            max_query_len=query_len,
            num_q_heads=m3.Q_HEADS,
            num_kv_heads=m3.KV_HEADS,
            head_dim=m3.HEAD_DIM,
            page_size=m3.PAGE_SIZE,
            topk=m3.TOPK,
            dtype=torch.bfloat16,
            kv_dtype=pages,
            arch=arch,
            device=m3.META,
        ),
    )
    return list(launches(call, arch=arch))
