"""Device functions and dtypes that the Triton kernels of several ops share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DOT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def pick(vector, place, SIZE: tl.constexpr):
    """Element `place` of SIZE numbers in registers, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == place, vector, 0), axis=0)
