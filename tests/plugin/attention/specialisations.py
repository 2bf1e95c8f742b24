"""What serving asks of Triton's compiler beyond the warm-up and the self-test, as JSON.

    python -m tests.plugin.attention.specialisations

A process of its own: where tests run, kernels may be interpreted ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_kernels.testing.specialisations import recorded
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.attention.self_test import self_test
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.warm_up import warm_up
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.model.config import MSAConfig

CPU = torch.device("cpu")
PAGE, DIM, HEADS, PAGES = 128, 128, 8, 8
RULES = MSAConfig(
    num_index_heads=1,
    index_dim=DIM,
    block_size=PAGE,
    topk_blocks=16,
    num_init_blocks=0,
    num_local_blocks=1,
)
TRITON = KernelChoice("triton", "test")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """Query rows of each request, the longest context, and the width of the host's page table."""

    rows: Sequence[int]
    max_seq_len: int = 2000
    table_width: int = 8192
    padding: int = 0


# Rows are those of a request that decodes, and those it drafts, and prompts; lengths are those
# of each kernel of the choice; tables are as wide as vLLM's, or as one prompt.
def serving(decode_rows: int) -> Iterator[Step]:
    for width in (1, 7, 8192):
        for length in (100, 100_000, 1_000_000):
            for rows in range(1, decode_rows + 1):
                yield Step([rows] * 3, length, width)
                yield Step([rows], length, width)
            yield Step([300], length, width)
            yield Step([1, 300, decode_rows, 2], length, width, padding=5)
            yield Step([decode_rows + 1], length, width)


def layer(index_dtype: torch.dtype, layout: str) -> MSACaches:
    """Pages as vLLM hands them out."""
    order = (1, PAGE) if layout == "LBHNC" else (PAGE, 1)
    fused = torch.zeros(PAGES, *order, 2 * DIM, dtype=DTYPE)
    fused = fused if layout == "LBHNC" else fused.transpose(1, 2)
    k_pages, v_pages = fused.split(DIM, dim=-1)
    index = torch.zeros(PAGES, PAGE, DIM).to(index_dtype)
    return MSACaches(k_pages, v_pages, index)


def run(session: MSASession, step: Step, caches: MSACaches, *, fused_index: bool) -> None:
    """A layer's call as the adapter makes it."""
    rows = sum(step.rows)
    sizes = [HEADS * DIM, DIM, DIM]
    index_sizes = [DIM, DIM]
    if fused_index:
        parts = torch.zeros(rows + step.padding, sum(sizes + index_sizes), dtype=DTYPE).split(
            sizes + index_sizes, -1
        )
    else:
        parts = (
            *torch.zeros(rows + step.padding, sum(sizes), dtype=DTYPE).split(sizes, -1),
            *torch.zeros(rows + step.padding, sum(index_sizes), dtype=DTYPE).split(index_sizes, -1),
        )
    *heads, index_k = parts
    given: list[Tensor] = [part.unflatten(-1, (-1, DIM)) for part in heads] + [index_k]
    weight = torch.zeros(DIM, dtype=DTYPE)
    batch = MSABatch(
        cu_seqlens_q=torch.tensor([0, *step.rows]).cumsum(0).int(),
        seq_lens=torch.tensor(step.rows, dtype=torch.int32),
        page_table=torch.zeros(len(step.rows), step.table_width, dtype=torch.int32),
        slot_mapping=torch.full((rows,), -1),
        max_query_len=max(step.rows),
        max_seq_len=step.max_seq_len,
    )
    out = torch.empty_like(given[0])
    session.run(
        session.plan(batch),
        *(part[:rows] for part in given),
        norms=HeadNorms(weight, weight, weight, weight, 1e-6),
        cos_sin=torch.zeros(rows, 64),
        caches=caches,
        out=out[:rows],
    )


def compiled_while_serving(
    arch: int, *, decode_rows: int, index_dtype: torch.dtype, layout: str
) -> dict[str, Any]:
    shape = LayerShape(HEADS, 1, DIM, 64, DTYPE, DTYPE, index_dtype)
    capacity = StepCapacity(4, 512, 2**20, decode_rows)
    session = MSASession(
        RULES,
        kernels=TRITON,
        scale=1.0,
        workspace=allocate_workspace(RULES, shape, capacity, device=CPU),
    )
    caches = layer(index_dtype, layout)
    with recorded(arch) as launches:
        warm_up(session, caches)
        warmed = {*launches}
        assert warm_up(session, layer(index_dtype, layout)) == 0
        for step in serving(decode_rows):
            for fused_index in (True, False):
                run(session, step, caches, fused_index=fused_index)
        served = {*launches}
        launches.clear()
        self_test(
            RULES,
            kernels=TRITON,
            num_q_heads=HEADS,
            num_kv_heads=1,
            head_dim=DIM,
            rotary_dim=64,
            dtype=DTYPE,
            index_dtype=index_dtype,
            device=CPU,
            pages=("packed-heads" if layout == "LBHNC" else "packed-slots",),
            decode_rows=decode_rows,
            max_seq_len=2**20,
        )
        tried = {*launches}
    return {
        "kernels": sorted({name for name, _ in served}),
        "compiled": len(warmed),
        "new": sorted(served - warmed),
        "untried": sorted({name for name, key in warmed if (name, key) not in tried}),
    }


def main() -> None:
    report = [
        compiled_while_serving(
            arch, decode_rows=decode_rows, index_dtype=index_dtype, layout=layout
        )
        for arch, decode_rows, index_dtype, layout in (
            (90, 1, DTYPE, "LBNHC"),
            (90, 4, DTYPE, "LBNHC"),
            (90, 4, torch.float8_e4m3fn, "LBNHC"),
            (100, 4, DTYPE, "LBHNC"),
            (80, 1, DTYPE, "LBHNC"),
        )
    ]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
