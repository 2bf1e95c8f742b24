"""`page_table`: its one kernel, for rows as SGLang counts them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.page_table.triton import launch_of
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import Variant


def variants(arch: int) -> Iterator[Variant]:
    """The table of several requests."""
    step = m3.step(7)
    launch = launch_of(
        step.page_table,
        slots=m3.meta(64, m3.TABLE_WIDTH * m3.PAGE_SIZE, dtype=torch.int32),
        rows=m3.meta(7, dtype=torch.int64),
        seq_lens=step.seq_lens,
        page_size=m3.PAGE_SIZE,
        arch=arch,
    )
    yield Variant("pages", launch, registers=40, shared=1024)
