"""`mxfp8_linear` as one Triton kernel: weights are decoded from bytes, for chips without fp8 too.

The weight is the first factor of each product, so that its decoded tile stays in registers where
tensor cores take it from there (sm_90), and few tokens fill a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from m3_kernels.launch import Launch
from m3_kernels.mxfp8_linear.call import Mxfp8Linear
from m3_kernels.tiles import MIN_TILE, power_of_two
from m3_kernels.triton_shared import DOT_DTYPES, pick
from m3_kernels.tuning import arch_of, kernel_config

# The least compute capability that converts e4m3 itself.
E4M3_ARCH = 89


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


# Tokens differ from step to step, and no step may wait for a compiler.
@triton.jit(do_not_specialize=["num_tokens"])
def mxfp8_linear_kernel(
    x,
    weight,
    scales,
    group_starts,
    out,
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
    HAS_E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Program (rows of the weight, tokens of one group): a tile of the transposed output."""
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
    acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in range(0, num_columns, COLUMNS):
        inside = column < num_columns - start
        codes = tl.load(values_at + start, mask=in_rows[:, None] & inside[None, :], other=0)
        stored = tl.load(
            scales_at + start // 32,
            mask=in_rows[:, None] & (block < (num_columns - start) // 32)[None, :],
            other=127,
        )
        factor = tl.broadcast_to(decode_e8m0(stored)[:, :, None], (ROWS, COLUMNS // 32, 32))
        decoded = decode_e4m3(codes, HAS_E4M3) * tl.reshape(factor, (ROWS, COLUMNS))
        tokens = tl.load(tokens_at + start, mask=in_tokens[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(
            decoded.to(DOT_DTYPE), tl.trans(tokens.to(DOT_DTYPE)), acc, input_precision="ieee"
        )
    place = out + token.to(tl.int64)[None, :] * out_stride + row[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=in_rows[:, None] & in_tokens[None, :])


def mxfp8_linear_triton(call: Mxfp8Linear) -> None:
    """Fill `call.out`."""
    if call.group_starts is not None:
        # rows of no group
        call.out.zero_()
    for launch in launches(call, arch=arch_of(call.device)):
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
    config = kernel_config("mxfp8_linear", arch=arch, dot=dot)
    tiles = triton.cdiv(tokens, config["TOKENS"])
    if starts is not None:
        # each group may end within a tile
        tiles += min(groups, tokens) - 1
    arguments = {
        "x": x,
        "weight": weight.view(torch.uint8),
        "scales": scales,
        "group_starts": x if starts is None else starts,
        "out": call.out,
        "num_tokens": tokens,
        "num_rows": rows,
        "num_columns": columns,
        "num_groups": groups,
        "x_stride": x.stride(0),
        "weight_stride_group": weight.stride(0),
        "weight_stride_row": weight.stride(1),
        "scales_stride_group": scales.stride(0),
        "scales_stride_row": scales.stride(1),
        "out_stride": call.out.stride(0),
        "GROUPED": starts is not None,
        "GROUPS_PAD": power_of_two(max(groups, MIN_TILE)),
        "HAS_E4M3": arch >= E4M3_ARCH,
        "DOT_DTYPE": DOT_DTYPES[x.dtype],
        **config,
    }
    yield Launch(mxfp8_linear_kernel, (triton.cdiv(rows, config["ROWS"]), tiles), arguments)
