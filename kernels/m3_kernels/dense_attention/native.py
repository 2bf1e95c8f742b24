"""`dense_attention` through the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.native_build import array, call


def dense_attention_native(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill `out` and `lse`; arguments as in the public function, already checked."""
    call(
        "m3_dense_attention",
        array(q),
        array(k_pages),
        array(v_pages),
        array(page_table),
        array(cu_seqlens_q),
        array(seq_lens),
        float(scale),
        array(out),
        None if lse is None else array(lse),
    )
