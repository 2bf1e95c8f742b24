"""`index_topk`: decode of 1 and 8 rows and prefill per dtype, and the choice at two lengths."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.index_topk.triton import launches
from m3_kernels.index_topk.workspace import allocate_index_topk_workspace
from m3_kernels.launch import Launch
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import LoopBudget, Variant

# Products of float32 keys run on no tensor core and spill; they are for checks, and not judged.
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
REQUESTS = 7
# Kinds of request, and of contexts of so many blocks, whose choice is configured apart.
CHOICES = (
    *(("decode", blocks) for blocks in (256, 1024, 8192)),
    *(("prefill", blocks) for blocks in (256, 8192)),
)

# Of sm_90, with the release of Triton that needs most.
HOT_LOOPS = {
    "decode scores bf16 q_len 1": LoopBudget(220, 900, barriers=6, shuffles=21, programs_per_sm=2),
    "decode scores bf16 q_len 8": LoopBudget(300, 1100, barriers=8, shuffles=41, programs_per_sm=2),
    "prefill scores bf16": LoopBudget(330, 900, barriers=5, shuffles=9, programs_per_sm=2),
    "decode scores int8 q_len 1": LoopBudget(
        880, 2850, barriers=9, shuffles=41, awaited_loads=4, programs_per_sm=3
    ),
    "decode scores int8 q_len 8": LoopBudget(
        1010, 3000, barriers=13, shuffles=81, awaited_loads=4, programs_per_sm=3
    ),
    "prefill scores int8": LoopBudget(
        760, 2000, barriers=8, shuffles=9, awaited_loads=16, programs_per_sm=2
    ),
    "decode scores e4m3 q_len 1": LoopBudget(
        510, 2700, conversions=128, barriers=6, shuffles=21, programs_per_sm=3
    ),
    "decode scores e4m3 q_len 8": LoopBudget(
        590, 2950, conversions=128, barriers=8, shuffles=41, programs_per_sm=3
    ),
    "prefill scores e4m3": LoopBudget(
        560, 2700, conversions=128, barriers=6, shuffles=9, programs_per_sm=2
    ),
    "decode choice up to 256 blocks": LoopBudget(
        90, 620, barriers=6, shuffles=16, programs_per_sm=16
    ),
    "decode choice up to 1024 blocks": LoopBudget(
        100, 680, barriers=6, shuffles=16, programs_per_sm=6
    ),
    "decode choice up to 8192 blocks": LoopBudget(
        100, 700, barriers=6, shuffles=18, programs_per_sm=3
    ),
    "prefill choice up to 256 blocks": LoopBudget(180, 750, shuffles=20, programs_per_sm=32),
    "prefill choice up to 8192 blocks": LoopBudget(250, 850, shuffles=20, programs_per_sm=32),
}


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel of the op."""
    for name, dtype in DTYPES.items():
        if name == "e4m3" and arch < 89:
            continue
        for query_len in (1, 8):
            scores, _ = launched(arch, dtype, query_len)
            yield judged(f"decode scores {name} q_len {query_len}", scores, arch, 168, 216, 112)
        _, _, scores, *_ = launched(arch, dtype, m3.PREFILL)
        yield judged(f"prefill scores {name}", scores, arch, 255, 255, 136)
    for kind, blocks in CHOICES:
        rows = 1 if kind == "decode" else m3.PREFILL
        *_, launch = launched(arch, torch.bfloat16, rows, blocks=blocks)
        name = f"{kind} choice up to {blocks} blocks"
        yield Variant(name, launch, 112, 4 * 1024, loop=m3.of_hopper(HOT_LOOPS, name, arch))


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
        loop=m3.of_hopper(HOT_LOOPS, name, arch),
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
