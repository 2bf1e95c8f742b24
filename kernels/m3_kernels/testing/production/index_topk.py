"""`index_topk`: decode of 1 and 8 rows and prefill per dtype, and the choice at two lengths."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.index_topk.triton import launches
from m3_kernels.index_topk.workspace import allocate_index_topk_workspace
from m3_kernels.launch import Launch
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import Variant

# Products of float32 keys run on no tensor core and spill; they are for checks, and not judged.
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
REQUESTS = 7


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel of the op."""
    for name, dtype in DTYPES.items():
        if name == "e4m3" and arch < 89:
            continue
        for query_len in (1, 8):
            scores, _ = launched(arch, dtype, query_len)
            yield judged(f"decode scores {name} q_len {query_len}", scores, arch, 168, 216, 112)
        _, _, scores, *_ = launched(arch, dtype, m3.PREFILL)
        yield judged(f"prefill scores {name}", scores, arch, 192, 255, 136)
    for blocks in (256, 8192):
        *_, prefill = launched(arch, torch.bfloat16, m3.PREFILL, blocks=blocks)
        _, decode = launched(arch, torch.bfloat16, 1, blocks=blocks)
        for kind, launch in (("decode", decode), ("prefill", prefill)):
            yield Variant(f"{kind} choice up to {blocks} blocks", launch, 96, 4 * 1024)


def judged(
    name: str, launch: Launch, arch: int, described: int, pointed: int, kilobytes: int
) -> Variant:
    """A kernel of scores; registers if it reads through descriptors and if it does not."""
    descriptors = launch.arguments["USE_DESCRIPTORS"]
    return Variant(
        name,
        launch,
        registers=described if descriptors else pointed,
        shared=kilobytes * 1024,
        needs=(m3.tensor_cores(arch), "UTMALDG" if descriptors else "LDGSTS"),
    )


def launched(arch: int, dtype: torch.dtype, query_len: int, *, blocks: int = 1000) -> list[Launch]:
    """What a step of several requests of so many rows launches."""
    plan = m3.plan(REQUESTS, query_len, blocks=blocks)
    rows = REQUESTS * query_len
    call = IndexTopk(
        m3.heads(rows, m3.KV_HEADS),
        m3.index_pages(dtype),
        m3.step(REQUESTS),
        topk=m3.TOPK,
        num_local_blocks=1,
        num_init_blocks=0,
        out=m3.meta(m3.KV_HEADS, rows, m3.TOPK, dtype=torch.int32),
        plan=plan,
        workspace=allocate_index_topk_workspace(
            max_reqs=REQUESTS,
            max_rows=rows,
            max_query_len=query_len,
            max_seq_len=plan.max_seq_len,
            num_index_heads=m3.KV_HEADS,
            page_size=m3.PAGE_SIZE,
            device=m3.META,
        ),
    )
    return list(launches(call, arch=arch))
