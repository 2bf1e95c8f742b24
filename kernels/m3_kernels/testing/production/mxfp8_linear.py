"""`mxfp8_linear`: a projection, and the experts of a layer, for bf16 activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.launch import Launch
from m3_kernels.mxfp8_linear.call import GROUP, Mxfp8Linear
from m3_kernels.mxfp8_linear.triton import launches
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import LoopBudget, Variant

EXPERTS, ROWS, COLUMNS = 128, 6144, 6144
# Tokens of a step: too few for the chip, enough, and those of a prompt.
FEW, SOME, MANY = 2, 100, 8192

# Of sm_90, with the release of Triton that needs most.
HOT_LOOPS = {
    "projection bf16, few tokens": LoopBudget(
        470, 1250, barriers=3, awaited_loads=2, programs_per_sm=3
    ),
    # sums of a segment and of those before it take a third program's registers
    "projection bf16": LoopBudget(470, 1250, barriers=3, awaited_loads=2, programs_per_sm=2),
    "projection bf16, prompts": LoopBudget(310, 1000, barriers=3, awaited_loads=2),
    "experts bf16, few tokens": LoopBudget(
        500, 1250, barriers=3, awaited_loads=2, programs_per_sm=2
    ),
    "experts bf16": LoopBudget(470, 1250, barriers=3, awaited_loads=2, programs_per_sm=2),
    "experts bf16, prompts": LoopBudget(310, 1000, barriers=3, awaited_loads=2),
}


def variants(arch: int) -> Iterator[Variant]:
    """One matrix, and one for each expert, for three kinds of step; and the sum of segments."""
    for kind, groups in (("projection bf16", ()), ("experts bf16", (EXPERTS,))):
        for tokens, suffix in ((FEW, ", few tokens"), (SOME, ""), (MANY, ", prompts")):
            tokens *= EXPERTS if groups and tokens > FEW else 1
            product, *rest = launched(arch, groups, tokens)
            name = f"{kind}{suffix}"
            yield Variant(
                name,
                product,
                registers=255,
                shared=101376,
                needs=(m3.tensor_cores(arch),),
                loop=m3.of_hopper(HOT_LOOPS, name, arch),
            )
            for launch in rest:
                yield Variant(f"{kind}, sum", launch, registers=64, shared=1024)


def launched(arch: int, groups: tuple[int, ...], tokens: int) -> list[Launch]:
    """What a product of so many tokens launches."""
    call = Mxfp8Linear(
        m3.meta(tokens, COLUMNS, dtype=torch.bfloat16),
        m3.meta(*groups, ROWS, COLUMNS, dtype=torch.float8_e4m3fn),
        m3.meta(*groups, ROWS, COLUMNS // GROUP, dtype=torch.uint8),
        m3.meta(EXPERTS + 1, dtype=torch.int32) if groups else None,
        m3.meta(tokens, ROWS, dtype=torch.bfloat16),
    )
    return list(launches(call, arch=arch))
