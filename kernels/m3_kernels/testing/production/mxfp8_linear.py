"""`mxfp8_linear`: a projection, and the experts of a layer, for bf16 activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.mxfp8_linear.call import GROUP, Mxfp8Linear
from m3_kernels.mxfp8_linear.triton import launches
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import LoopBudget, Variant

EXPERTS, ROWS, COLUMNS, TOKENS = 128, 3072, 6144, 7

# Of sm_90, with the release of Triton that needs most.
HOT_LOOPS = {
    "projection bf16": LoopBudget(1240, 2650, barriers=3, awaited_loads=2, programs_per_sm=3),
    "experts bf16": LoopBudget(1210, 2700, barriers=3, awaited_loads=2, programs_per_sm=3),
}


def variants(arch: int) -> Iterator[Variant]:
    """One matrix, and one for each expert."""
    for name, groups in (("projection bf16", ()), ("experts bf16", (EXPERTS,))):
        call = Mxfp8Linear(
            m3.meta(TOKENS, COLUMNS, dtype=torch.bfloat16),
            m3.meta(*groups, ROWS, COLUMNS, dtype=torch.float8_e4m3fn),
            m3.meta(*groups, ROWS, COLUMNS // GROUP, dtype=torch.uint8),
            m3.meta(EXPERTS + 1, dtype=torch.int32) if groups else None,
            m3.meta(TOKENS, ROWS, dtype=torch.bfloat16),
        )
        (launch,) = launches(call, arch=arch)
        yield Variant(
            name,
            launch,
            registers=255,
            shared=101376,
            needs=(m3.tensor_cores(arch),),
            loop=m3.of_hopper(HOT_LOOPS, name, arch),
        )
