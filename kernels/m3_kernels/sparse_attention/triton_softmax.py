"""Complete sums of a softmax become outputs: shared by the decode and the prefill kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# Kernels keep logits in units of log 2, where exp2 and log2 are one instruction each.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finish(peak, total, acc):
    """Outputs and natural lse of complete sums; 0 and -inf where no key weighs anything."""
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    out = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    # A NaN logit leaves its mark in the total, never in the peak.
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(divisor)) * LN_2)
    return out, lse


@triton.jit
def put_result(
    out_start,
    lse_start,
    rows,
    heads,
    stored,
    peak,
    total,
    acc,
    factor,
    out_stride_row,
    out_stride_head,
    lse_stride_row,
    lse_stride_head,
    HAS_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write outputs and lse of complete sums; `rows`, `heads` and `stored` are [R], acc [R, D]."""
    result, log_sum = finish(peak, total, acc)
    dim = tl.arange(0, acc.shape[1])
    rows = rows.to(tl.int64)
    tl.store(
        (out_start + rows * out_stride_row + heads * out_stride_head)[:, None] + dim[None, :],
        (result * factor).to(out_start.dtype.element_ty),
        mask=stored[:, None] & (dim < HEAD_DIM)[None, :],
    )
    if HAS_LSE:
        place = rows * lse_stride_row + heads.to(tl.int64) * lse_stride_head
        tl.store(lse_start + place, log_sum, mask=stored)
