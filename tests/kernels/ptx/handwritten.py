"""Kernels written by hand, a few instructions long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from m3_kernels.testing.ptx.machine import prepare, run
from m3_kernels.testing.ptx.memory import GlobalMemory
from m3_kernels.testing.ptx.parse import Kernel, parse

TEMPLATE = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry hand(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<256>;
    .reg .b64 %rd<64>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
{loads}
{body}
    ret;
}}
"""


def kernel(body: str, tensors: Sequence[Tensor], *, threads: int = 32) -> Kernel:
    """A kernel in which %r0 is the thread, %r1 the program and %r3 the thread of the grid.

    %rd0, %rd1, ... point to the tensors, and %rd10, %rd11, ... to the thread's own number in each.
    """
    names = [f"hand_param_{i}" for i in range(len(tensors))]
    loads = [
        f"    ld.param.b64 %rd{i}, [{name}];\n"
        f"    mad.wide.u32 %rd{i + 10}, %r3, {tensor.element_size()}, %rd{i};"
        for i, (name, tensor) in enumerate(zip(names, tensors, strict=True))
    ]
    text = TEMPLATE.format(
        parameters=",\n".join(f"    .param .u64 .ptr .global .align 1 {name}" for name in names),
        threads=threads,
        loads="\n".join(loads),
        body=body,
    )
    return parse(text)


def launch(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    seed: int = 0,
    batch_threads: int = 4096,
) -> Counter[str]:
    """Run it; how often which instruction was."""
    made = kernel(body, tensors, threads=threads)
    pointers = {
        parameter.name: np.uint64(tensor.data_ptr())
        for parameter, tensor in zip(made.parameters, tensors, strict=True)
    }
    return run(
        prepare(made),
        grid=(programs, 1, 1),
        parameters=pointers,
        memory=GlobalMemory(tensors),
        shared=shared,
        seed=seed,
        batch_threads=batch_threads,
    )


def computed(instructions: str, *sources: Tensor, result: torch.dtype) -> Tensor:
    """What one thread for each number makes of it.

    `{a}`, `{b}` and `{c}` are the sources and `{d}` is the result, in registers of their sizes.
    """
    registers = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    threads = -(-len(sources[0]) // 32) * 32
    out = torch.zeros(threads, dtype=result)
    padded = []
    lines = []
    names = {"d": f"{registers[out.element_size()]}60"}
    for place, source in enumerate(sources):
        wide = torch.zeros(threads, dtype=source.dtype)
        wide[: len(source)] = source
        padded.append(wide)
        letter, size = "abc"[place], source.element_size()
        names[letter] = f"{registers[size]}{50 + place}"
        lines.append(f"ld.global.b{8 * size} {names[letter]}, [%rd{10 + place}];")
    lines.append(instructions.format(**names))
    size = out.element_size()
    lines.append(f"st.global.b{8 * size} [%rd{10 + len(sources)}], {names['d']};")
    launch("\n".join(lines), *padded, out, threads=threads)
    return out[: len(sources[0])]
