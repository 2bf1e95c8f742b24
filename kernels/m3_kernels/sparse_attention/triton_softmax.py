"""Online softmax: sums over keys, folded with other sums, and finished.

Keys lie along the first axis of a tile of logits where lines, pairs of a query row and a head, are
few (KEY_AXIS 0: tensor cores want one tall side), along the second where they are many (1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Kernels keep logits in units of log 2, where exp2 and log2 are one instruction each.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Sums(NamedTuple):
    """Softmax of the keys so far; fp32 [LINES], and acc [HEAD_PAD, LINES] or its transpose."""

    peak: Any
    total: Any
    acc: Any


@triton.jit
def no_keys(KEY_AXIS: tl.constexpr, LINES: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Sums before the first key."""
    peak = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    if KEY_AXIS == 0:
        acc = tl.zeros([HEAD_PAD, LINES], tl.float32)
    else:
        acc = tl.zeros([LINES, HEAD_PAD], tl.float32)
    return Sums(peak, total, acc)


@triton.jit
def sum_keys(values, KEYS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of a [KEYS, COLUMNS] tile along its keys, in one order for every layout of threads.

    `tl.sum` adds in the order of the tile's layout, which depends on its shape and so on how many
    rows are computed together. A sum of two has no order.
    """
    # Within a thread, then within a warp, then between warps, as tensor cores leave their results.
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, 8, COLUMNS]), axis=1)
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, 4, COLUMNS]), axis=1)
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, 2, COLUMNS]), axis=1)
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, COLUMNS]), axis=1)
    for level in tl.static_range(5, 16):
        if (KEYS >> level) > 0:
            values = tl.sum(tl.reshape(values, [2, KEYS >> level, COLUMNS]), axis=0)
    return tl.reshape(values, [COLUMNS])


@triton.jit
def attend(query, k, v, visible, scale, sums, KEY_AXIS: tl.constexpr):
    """One step of online softmax.

    A line that sees none of the keys keeps its sums to the bit: its weights are 0 and its factor is
    exp2(0). Logits are in units of log 2.

    Parameters
    ----------
    query : [HEAD_PAD, LINES] with KEY_AXIS 0, else [LINES, HEAD_PAD]
    k, v : [KEYS, HEAD_PAD]
    visible : as the logits, [KEYS, LINES] or its transpose
    """
    if KEY_AXIS == 0:
        logits = tl.dot(k, query, input_precision="ieee") * scale
    else:
        logits = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where(visible, logits, float("-inf"))
    peak = tl.maximum(sums.peak, tl.max(logits, axis=KEY_AXIS))
    # Without any key yet the peak is -inf, and -inf - -inf would be NaN.
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    factor = tl.exp2(sums.peak - origin)
    weights = tl.exp2(logits - tl.expand_dims(origin, KEY_AXIS))
    acc = sums.acc * tl.expand_dims(factor, KEY_AXIS)
    if KEY_AXIS == 0:
        total = sums.total * factor + sum_keys(weights, weights.shape[0], weights.shape[1])
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc, input_precision="ieee")
    else:
        total = sums.total * factor + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return Sums(peak, total, acc)


@triton.jit
def fold(sums, further):
    """Sums [LINES, HEAD_PAD] with those of further keys. Folding onto nothing is exact."""
    peak = tl.maximum(sums.peak, further.peak)
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    factor = tl.exp2(sums.peak - origin)
    further_factor = tl.exp2(further.peak - origin)
    total = sums.total * factor + further.total * further_factor
    acc = sums.acc * factor[:, None] + further.acc * further_factor[:, None]
    return Sums(peak, total, acc)


@triton.jit
def is_broken(sums, AT_ONCE: tl.constexpr):
    """Whether any accumulator is not finite.

    A value that is not finite times a weight of 0 is NaN: then each row is done again without the
    keys of the others, so that a row that sees none gets the bits it has anywhere else.
    """
    marks = tl.where(tl.abs(sums.acc) < float("inf"), 0, 1)
    # One axis after the other fails to compile for sm_100 in Triton 3.6; at once spills on sm_90.
    mark = tl.max(marks) if AT_ONCE else tl.max(tl.max(marks, axis=0), axis=0)
    return mark > 0


class Outputs(NamedTuple):
    """Where results go.

    Attributes
    ----------
    out, out_stride_row, out_stride_head : outputs [T, num_q_heads, head_dim]
    lse, lse_stride_row, lse_stride_head : natural lse [T, num_q_heads], or None and any numbers
    factor : of the outputs, e.g. the scale of the stored values
    """

    out: Any
    out_stride_row: Any
    out_stride_head: Any
    lse: Any
    lse_stride_row: Any
    lse_stride_head: Any
    factor: Any


@triton.jit
def put_result(
    outputs,
    rows,
    heads,
    stored,
    sums,
    KEY_AXIS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write outputs and lse of complete sums; 0 and -inf where no key weighs anything.

    `rows`, `heads` and `stored` are of lines.
    """
    acc = sums.acc
    if KEY_AXIS == 0:
        acc = tl.trans(acc)
    empty = sums.total == 0
    divisor = tl.where(empty, 1.0, sums.total)
    result = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    dim = tl.arange(0, acc.shape[1])
    rows = rows.to(tl.int64)
    starts = outputs.out + rows * outputs.out_stride_row + heads * outputs.out_stride_head
    tl.store(
        starts[:, None] + dim[None, :],
        (result * outputs.factor).to(outputs.out.dtype.element_ty),
        mask=stored[:, None] & (dim < HEAD_DIM)[None, :],
    )
    if HAS_LSE:
        # A NaN logit leaves its mark in the total, never in the peak.
        log_sum = (sums.peak + tl.log2(divisor)) * LN_2
        place = rows * outputs.lse_stride_row + heads.to(tl.int64) * outputs.lse_stride_head
        tl.store(outputs.lse + place, tl.where(empty, float("-inf"), log_sum), mask=stored)
