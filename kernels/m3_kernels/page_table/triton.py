"""The page table as one Triton kernel per step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.launch import Launch
from m3_kernels.tuning import arch_of, kernel_config


@triton.jit(do_not_specialize=["slots_stride", "table_stride"])
def page_table_kernel(
    page_table,
    slots,
    rows,
    seq_lens,
    slots_stride,
    table_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program (r, i): blocks i * BLOCKS and following of request r, if it is as long."""
    request = tl.program_id(0)
    first = tl.program_id(1) * BLOCKS
    seq_len = tl.load(seq_lens + request)
    blocks = (seq_len + PAGE_SIZE - 1) // PAGE_SIZE
    if first >= blocks:
        return
    block = first + tl.arange(0, BLOCKS)
    exists = block < blocks
    begin = tl.load(rows + request).to(tl.int64) * slots_stride
    slot = tl.load(slots + begin + block.to(tl.int64) * PAGE_SIZE, mask=exists, other=0)
    line = page_table + request.to(tl.int64) * table_stride
    tl.store(line + block, slot // PAGE_SIZE, mask=exists)


def fill_page_table_triton(
    page_table: Tensor, *, slots: Tensor, rows: Tensor, seq_lens: Tensor, page_size: int
) -> None:
    """Fill the table; arguments as in the public function, already checked."""
    if not page_table.numel():
        return
    arch = arch_of(page_table.device)
    launch_of(
        page_table, slots=slots, rows=rows, seq_lens=seq_lens, page_size=page_size, arch=arch
    )()


def launch_of(
    page_table: Tensor,
    *,
    slots: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    page_size: int,
    arch: int,
) -> Launch:
    """What fills a table, with the configuration of a chip (major * 10 + minor)."""
    config = kernel_config("page_table", arch=arch)
    num_reqs, blocks = page_table.shape
    arguments = {
        "page_table": page_table,
        "slots": slots,
        "rows": rows,
        "seq_lens": seq_lens,
        "slots_stride": slots.stride(0),
        "table_stride": page_table.stride(0),
        "PAGE_SIZE": page_size,
    }
    grid = (num_reqs, -(-blocks // config["BLOCKS"]))
    return Launch(page_table_kernel, grid, arguments | config)
