"""`index_merge` through the C++ kernels."""

from __future__ import annotations

from m3_kernels.index_merge.call import IndexMerge
from m3_kernels.native_build import array
from m3_kernels.native_build import call as run


def index_merge_native(call: IndexMerge) -> None:
    """Fill `call.out`."""
    run(
        "m3_index_merge",
        array(call.ids),
        array(call.scores),
        array(call.cu_seqlens_q),
        array(call.seq_lens),
        array(call.out),
        call.page_size,
        call.num_local_blocks,
        call.num_init_blocks,
    )
