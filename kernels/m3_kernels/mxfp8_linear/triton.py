"""`mxfp8_linear` as one Triton kernel: weights are decoded from bytes, for chips without fp8 too.

The weight is the first factor of each product, so that its decoded tile stays in registers where
tensor cores take it from there (sm_90), and few tokens fill a tile.

Sums over columns form a fixed tree: first within segments of so many columns, then the segments in
order. Where few programs would run, each takes one segment, and a second launch adds them up; else
a program does all of that itself. The bits are the same, so the number of tokens decides none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.launch import Launch
from m3_kernels.mxfp8_linear.call import GROUP, Mxfp8Linear
from m3_kernels.tiles import MIN_TILE, power_of_two
from m3_kernels.triton_shared import DOT_DTYPES, pick
from m3_kernels.tuning import arch_of, kernel_config

# The least compute capability that converts e4m3 itself.
E4M3_ARCH = 89

# Doublings of the tokens of a matrix; more tokens than that many compile nothing else.
DOUBLINGS = 14


@triton.jit
def decode_e4m3(code, HAS_E4M3: tl.constexpr):
    """Bytes to fp32, by the chip's own conversion where it has one: to fp16, which is exact.

    Otherwise by integers: fp16 with four bits of exponent is e4m3 times 2 ** -8, subnormals
    included.
    """
    if HAS_E4M3:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        magnitude = (code & 0x7F).to(tl.uint16) << 7
        sign = (code & 0x80).to(tl.uint16) << 8
        scaled = (sign | magnitude).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), scaled)
    return value


@triton.jit
def decode_e8m0(stored):
    """Bytes to fp32 powers of two, 2 ** (stored - 127); 0 is a subnormal, 255 is not a number."""
    exponent = stored.to(tl.uint32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
    bits = tl.where(exponent == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


class Operands(NamedTuple):
    """Where a program's tile finds its factors: pointers at column 0, and what of it exists.

    Attributes
    ----------
    codes, scales, tokens : pointers [ROWS, COLUMNS], [ROWS, COLUMNS / 32] and [TOKENS, COLUMNS]
    in_rows, in_tokens : bool [ROWS] and [TOKENS]
    """

    codes: Any
    scales: Any
    tokens: Any
    in_rows: Any
    in_tokens: Any


@triton.jit
def sum_of_segment(
    operands,
    first,
    end,
    num_columns,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Products of the columns `first:end` of a tile, fp32 [ROWS, TOKENS]."""
    column = tl.arange(0, COLUMNS)
    block = tl.arange(0, COLUMNS // 32)
    in_rows, in_tokens = operands.in_rows[:, None], operands.in_tokens[:, None]
    acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in range(first, end, COLUMNS):
        inside = column < num_columns - start
        codes = tl.load(operands.codes + start, mask=in_rows & inside[None, :], other=0)
        stored = tl.load(
            operands.scales + start // 32,
            mask=in_rows & (block < (num_columns - start) // 32)[None, :],
            other=127,
        )
        factor = tl.broadcast_to(decode_e8m0(stored)[:, :, None], (ROWS, COLUMNS // 32, 32))
        decoded = decode_e4m3(codes, HAS_E4M3) * tl.reshape(factor, (ROWS, COLUMNS))
        tokens = tl.load(operands.tokens + start, mask=in_tokens & inside[None, :], other=0.0)
        acc = tl.dot(
            decoded.to(DOT_DTYPE), tl.trans(tokens.to(DOT_DTYPE)), acc, input_precision="ieee"
        )
    return acc


# Tokens differ from step to step, and no step may wait for a compiler.
@triton.jit(do_not_specialize=["num_tokens"])
def mxfp8_linear_kernel(
    x,
    weight,
    scales,
    group_starts,
    out,
    partial,
    num_tokens,
    num_rows,
    num_columns,
    num_groups,
    x_stride,
    weight_stride_group,
    weight_stride_row,
    scales_stride_group,
    scales_stride_row,
    out_stride,
    GROUPED: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Program (rows of the weight, tokens of one group): a tile of the transposed output.

    SPLIT: programs (rows, tokens, segment of columns), which leave sums in `partial`, fp32
    [segments, num_tokens, num_rows].
    """
    tile = tl.program_id(1)
    group = tl.full([], 0, tl.int32)
    first = tile * TOKENS
    last = num_tokens
    if GROUPED:
        # every group starts a tile of its own; programs beyond the last tile have nothing to do
        lane = tl.arange(0, GROUPS_PAD)
        starts = tl.load(group_starts + lane, mask=lane < num_groups, other=0)
        ends = tl.load(group_starts + lane + 1, mask=lane < num_groups, other=0)
        tiles = (ends - starts + TOKENS - 1) // TOKENS
        through = tl.cumsum(tiles, axis=0)
        group = tl.sum((through <= tile).to(tl.int32), axis=0)
        if group >= num_groups:
            return
        before = pick(through - tiles, group, GROUPS_PAD)
        first = pick(starts, group, GROUPS_PAD) + (tile - before) * TOKENS
        last = pick(ends, group, GROUPS_PAD)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    block = tl.arange(0, COLUMNS // 32)
    in_rows = row < num_rows
    in_tokens = token < last
    group = group.to(tl.int64)
    wide_row = row.to(tl.int64)[:, None]
    values_at = (
        weight + group * weight_stride_group + wide_row * weight_stride_row + column[None, :]
    )
    scales_at = scales + group * scales_stride_group + wide_row * scales_stride_row + block[None, :]
    tokens_at = x + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    segment = tl.program_id(2)
    operands = Operands(values_at, scales_at, tokens_at, in_rows, in_tokens)
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    if SPLIT:
        start = segment * SEGMENT
        end = tl.minimum(num_columns, start + SEGMENT)
        total += sum_of_segment(
            operands, start, end, num_columns, ROWS, TOKENS, COLUMNS, HAS_E4M3, DOT_DTYPE
        )
    else:
        for start in range(0, num_columns, SEGMENT):
            end = tl.minimum(num_columns, start + SEGMENT)
            total += sum_of_segment(
                operands, start, end, num_columns, ROWS, TOKENS, COLUMNS, HAS_E4M3, DOT_DTYPE
            )
    stored = in_rows[:, None] & in_tokens[None, :]
    if SPLIT:
        place = (segment.to(tl.int64) * num_tokens + token[None, :]) * num_rows + row[:, None]
        tl.store(partial + place, total, mask=stored)
    else:
        place = out + token.to(tl.int64)[None, :] * out_stride + row[:, None]
        tl.store(place, total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_tokens"])
def mxfp8_sum_kernel(
    partial,
    group_starts,
    out,
    num_tokens,
    num_rows,
    num_groups,
    out_stride,
    GROUPED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Program (rows of the weight, token): adds the segments in order; 0 for tokens of no group."""
    token = tl.program_id(1)
    row = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    in_rows = row < num_rows
    there = in_rows
    if GROUPED:
        first, end = tl.load(group_starts), tl.load(group_starts + num_groups)
        there = row < tl.where((token >= first) & (token < end), num_rows, 0)
    total = tl.zeros([SUMS], dtype=tl.float32)
    for segment in tl.static_range(SEGMENTS):
        place = (token.to(tl.int64) + segment * num_tokens) * num_rows + row
        total += tl.load(partial + place, mask=there, other=0.0)
    place = out + token.to(tl.int64) * out_stride + row
    tl.store(place, total.to(out.dtype.element_ty), mask=in_rows)


def mxfp8_linear_triton(call: Mxfp8Linear) -> None:
    """Fill `call.out`."""
    found = list(launches(call, arch=arch_of(call.device)))
    if call.group_starts is not None and len(found) == 1:
        # rows of no group; a launch that adds up fills those itself
        call.out.zero_()
    for launch in found:
        launch()


def launches(call: Mxfp8Linear, *, arch: int) -> Iterator[Launch]:
    """What is launched for a call, with the configuration of a chip (major * 10 + minor).

    The grid follows from shapes alone, so that a CUDA graph can hold the launch.
    """
    x, starts, (weight, scales) = call.x, call.group_starts, call.matrices
    tokens, columns = x.shape
    groups, rows, _ = weight.shape
    if tokens == 0 or rows == 0:
        return
    dot = str(x.dtype).removeprefix("torch.")
    # the look-up is kept for each power of two
    per_group = power_of_two(max(1, tokens // groups))
    grouped = starts is not None
    config = kernel_config("mxfp8_linear", arch=arch, dot=dot, tokens=per_group, grouped=grouped)
    few, sums = config.pop("SPLIT_BELOW"), config.pop("SUMS")
    tiles = triton.cdiv(tokens, config["TOKENS"])
    if grouped:
        # each group may end within a tile
        tiles += min(groups, tokens) - 1
    row_tiles = triton.cdiv(rows, config["ROWS"])
    segments = triton.cdiv(columns, config["SEGMENT"])
    split = segments > 1 and row_tiles * tiles < few
    partial = call.out
    if split:
        partial = torch.empty(segments, tokens, rows, dtype=torch.float32, device=x.device)
    shared = {
        "partial": partial,
        "group_starts": x if starts is None else starts,
        "out": call.out,
        "num_tokens": tokens,
        "num_rows": rows,
        "num_groups": groups,
        "out_stride": call.out.stride(0),
        "GROUPED": grouped,
    }
    arguments = {
        **shared,
        "x": x,
        "weight": weight.view(torch.uint8),
        "scales": scales,
        "num_columns": columns,
        "x_stride": x.stride(0),
        "weight_stride_group": weight.stride(0),
        "weight_stride_row": weight.stride(1),
        "scales_stride_group": scales.stride(0),
        "scales_stride_row": scales.stride(1),
        "GROUPS_PAD": power_of_two(max(groups, MIN_TILE)),
        "SPLIT": split,
        "HAS_E4M3": arch >= E4M3_ARCH,
        "DOT_DTYPE": DOT_DTYPES[x.dtype],
        **config,
    }
    yield Launch(mxfp8_linear_kernel, (row_tiles, tiles, segments if split else 1), arguments)
    if split:
        yield Launch(
            mxfp8_sum_kernel,
            (triton.cdiv(rows, sums), tokens),
            {**shared, "SEGMENTS": segments, "SUMS": sums, "num_warps": 1},
        )


def compile_for_all_steps(weight: Tensor, scales: Tensor, *, dtype: torch.dtype) -> None:
    """Have Triton compile what products of a stored weight launch, for every number of tokens.

    So no request waits for a compiler. Nothing is launched, and nothing done where it was before
    for a weight of this shape.

    Parameters
    ----------
    weight, scales : as in `mxfp8_linear`, on a GPU
    dtype : of the activations
    """
    with torch.device("meta"):
        _compile(weight.shape, weight.stride(), scales.stride(), dtype, arch_of(weight.device))


@cache
def _compile(
    shape: torch.Size,
    weight_strides: tuple[int, ...],
    scales_strides: tuple[int, ...],
    dtype: torch.dtype,
    arch: int,
) -> None:
    """The same, of tensors that are only described."""
    *groups, rows, columns = shape
    weight = torch.empty_strided(shape, weight_strides, dtype=torch.float8_e4m3fn)
    blocks = (*groups, rows, columns // GROUP)
    scales = torch.empty_strided(blocks, scales_strides, dtype=torch.uint8)
    starts = torch.empty(groups[0] + 1, dtype=torch.int32) if groups else None
    count = groups[0] if groups else 1
    # Least and most tokens that look the same row of the configuration up: fewer are split first.
    least = (count * (2**doublings // 2 + 1) if doublings else 1 for doublings in range(DOUBLINGS))
    most = (count * (2**doublings + 1) - 1 for doublings in range(DOUBLINGS))
    for tokens in (*least, *most):
        x, out = (torch.empty(tokens, size, dtype=dtype) for size in (columns, rows))
        for launch in launches(Mxfp8Linear(x, weight, scales, starts, out), arch=arch):
            launch.kernel.warmup(grid=launch.grid, **launch.arguments)
