"""`sparse_attention` through the C++ kernels."""

from __future__ import annotations

from m3_kernels.native_build import array
from m3_kernels.native_build import call as run
from m3_kernels.sparse_attention.call import SparseAttention


def sparse_attention_native(call: SparseAttention) -> None:
    """Fill `call.out` and `call.lse`."""
    run(
        "m3_sparse_attention",
        array(call.q),
        array(call.kv.k_pages),
        array(call.kv.v_pages),
        array(call.block_ids),
        array(call.step.page_table),
        array(call.step.cu_seqlens_q),
        array(call.step.seq_lens),
        float(call.scale),
        array(call.out),
        None if call.lse is None else array(call.lse),
    )
