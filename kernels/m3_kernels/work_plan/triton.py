"""The work plan as one Triton kernel per step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.launch import Launch
from m3_kernels.tuning import arch_of, kernel_config
from m3_kernels.work_plan.plan import TILE_ROWS, WorkPlan


@triton.jit
def decode_blocks(query_len, seq_len, PAGE_SIZE: tl.constexpr, DECODE_ROWS: tl.constexpr):
    """Visible blocks of requests of decode kind, 0 for the others."""
    decode = (query_len >= 1) & (query_len <= DECODE_ROWS)
    return tl.where(decode, (seq_len + PAGE_SIZE - 1) // PAGE_SIZE, 0)


@triton.jit
def prefill_tiles(query_len, seq_len, TILE_ROWS: tl.constexpr, DECODE_ROWS: tl.constexpr):
    """Tiles of requests of prefill kind, 0 for the others."""
    # A shift by whole tiles keeps dividends positive, where division is the floor for rows before
    # position 0 too.
    shift = (query_len + TILE_ROWS - 1) // TILE_ROWS + 1
    first = (seq_len - query_len + shift * TILE_ROWS) // TILE_ROWS
    last = (seq_len - 1 + shift * TILE_ROWS) // TILE_ROWS
    return tl.where(query_len > DECODE_ROWS, last - first + 1, 0)


@triton.jit(do_not_specialize=["num_reqs", "num_rows", "num_programs", "range_tiles"])
def work_plan_kernel(
    cu_seqlens_q,
    seq_lens,
    cum_blocks,
    cum_tiles,
    range_start,
    range_request,
    row_request,
    num_reqs,
    num_rows,
    num_programs,
    range_tiles,
    PAGE_SIZE: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    REQUESTS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Program 0 writes the prefix sums, the next `range_tiles` the ranges, the rest the rows.

    The programs of ranges and rows handle ITEMS each, and see REQUESTS requests at a time; each
    adds up the blocks again, which is cheaper than to wait for another program.
    """
    program = tl.program_id(0)
    item = tl.arange(0, ITEMS)
    lane = tl.arange(0, REQUESTS)
    if program > range_tiles:
        row = (program - range_tiles - 1) * ITEMS + item
        request = tl.zeros([ITEMS], tl.int32)
        for start in range(0, num_reqs, REQUESTS):
            exists = start + lane < num_reqs
            ends = tl.load(cu_seqlens_q + start + lane + 1, mask=exists, other=2147483647)
            request += tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), axis=1)
        tl.store(row_request + row, request, mask=row < num_rows)
        return

    total = tl.zeros([], tl.int32)
    if program > 0:
        for start in range(0, num_reqs, REQUESTS):
            exists = start + lane < num_reqs
            first = tl.load(cu_seqlens_q + start + lane, mask=exists, other=0)
            query_len = tl.load(cu_seqlens_q + start + lane + 1, mask=exists, other=0) - first
            seq_len = tl.load(seq_lens + start + lane, mask=exists, other=0)
            total += tl.sum(decode_blocks(query_len, seq_len, PAGE_SIZE, DECODE_ROWS), axis=0)
    taker = (program - 1) * ITEMS + item
    begin = (taker.to(tl.int64) * total // num_programs).to(tl.int32)

    blocks_before = tl.zeros([], tl.int32)
    tiles_before = tl.zeros([], tl.int32)
    request = tl.zeros([ITEMS], tl.int32)
    for start in range(0, num_reqs, REQUESTS):
        exists = start + lane < num_reqs
        first = tl.load(cu_seqlens_q + start + lane, mask=exists, other=0)
        query_len = tl.load(cu_seqlens_q + start + lane + 1, mask=exists, other=0) - first
        seq_len = tl.load(seq_lens + start + lane, mask=exists, other=0)
        blocks = decode_blocks(query_len, seq_len, PAGE_SIZE, DECODE_ROWS)
        block_ends = blocks_before + tl.cumsum(blocks, axis=0)
        blocks_before += tl.sum(blocks, axis=0)
        if program == 0:
            tiles = prefill_tiles(query_len, seq_len, TILE_ROWS, DECODE_ROWS)
            tile_ends = tiles_before + tl.cumsum(tiles, axis=0)
            tiles_before += tl.sum(tiles, axis=0)
            tl.store(cum_blocks + start + lane + 1, block_ends, mask=exists)
            tl.store(cum_tiles + start + lane + 1, tile_ends, mask=exists)
        else:
            before = (block_ends[None, :] <= begin[:, None]) & exists[None, :]
            request += tl.sum(before.to(tl.int32), axis=1)
    if program == 0:
        tl.store(cum_blocks, 0)
        tl.store(cum_tiles, 0)
    else:
        tl.store(range_start + taker, begin, mask=taker <= num_programs)
        tl.store(range_request + taker, request, mask=taker < num_programs)


def fill_work_plan_triton(plan: WorkPlan, *, cu_seqlens_q: Tensor, seq_lens: Tensor) -> None:
    """Fill the tensors of a plan; arguments as in the public function, already checked."""
    arch = arch_of(seq_lens.device)
    launch_of(plan, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, arch=arch)()


def launch_of(plan: WorkPlan, *, cu_seqlens_q: Tensor, seq_lens: Tensor, arch: int) -> Launch:
    """What fills a plan, with the configuration of a chip (major * 10 + minor)."""
    config = kernel_config("work_plan", arch=arch)
    num_rows = plan.row_request.shape[0]
    range_tiles = -(-(plan.num_programs + 1) // config["ITEMS"])
    row_tiles = -(-num_rows // config["ITEMS"])
    arguments = {
        "cu_seqlens_q": cu_seqlens_q,
        "seq_lens": seq_lens,
        "cum_blocks": plan.cum_blocks,
        "cum_tiles": plan.cum_tiles,
        "range_start": plan.range_start,
        "range_request": plan.range_request,
        "row_request": plan.row_request,
        "num_reqs": seq_lens.shape[0],
        "num_rows": num_rows,
        "num_programs": plan.num_programs,
        "range_tiles": range_tiles,
        "PAGE_SIZE": plan.page_size,
        "DECODE_ROWS": plan.decode_rows,
        "TILE_ROWS": TILE_ROWS,
    }
    return Launch(work_plan_kernel, (1 + range_tiles + row_tiles,), arguments | config)
