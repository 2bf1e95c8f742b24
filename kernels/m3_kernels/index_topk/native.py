"""`index_topk` and `index_candidates` through the C++ kernels."""

from __future__ import annotations

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.native_build import array
from m3_kernels.native_build import call as run


def index_topk_native(call: IndexTopk) -> None:
    """Fill `call.out`, and `call.scores` of a share."""
    step, scales, low = call.step, call.keys.index_k_scales, call.keys.index_k_low
    share, scores = call.share, call.scores
    run(
        "m3_index_topk",
        array(call.index_q),
        array(call.keys.index_k_pages),
        None if scales is None else array(scales),
        None if low is None else array(low),
        array(step.page_table),
        array(step.cu_seqlens_q),
        array(step.seq_lens),
        array(call.out),
        None if share is None else array(share.first),
        None if share is None else array(share.end),
        None if scores is None else array(scores),
        call.num_local_blocks,
        call.num_init_blocks,
    )
