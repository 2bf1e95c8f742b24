"""`work_plan`: its one kernel."""

from __future__ import annotations

from collections.abc import Iterator

from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import Variant
from m3_kernels.work_plan.triton import launch_of


def variants(arch: int) -> Iterator[Variant]:
    """The plan of a step of several requests."""
    step = m3.step(7)
    launch = launch_of(
        m3.plan(7, 3), cu_seqlens_q=step.cu_seqlens_q, seq_lens=step.seq_lens, arch=arch
    )
    yield Variant("plan", launch, registers=128, shared=8 * 1024)
