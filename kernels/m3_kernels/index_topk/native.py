"""`index_topk` through the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.native_build import array, call


def index_topk_native(
    index_q: Tensor,
    index_k_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    num_local_blocks: int,
    num_init_blocks: int,
    index_k_scales: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`; arguments as in the public function, already checked."""
    call(
        "m3_index_topk",
        array(index_q),
        array(index_k_pages),
        None if index_k_scales is None else array(index_k_scales),
        array(page_table),
        array(cu_seqlens_q),
        array(seq_lens),
        array(out),
        num_local_blocks,
        num_init_blocks,
    )
