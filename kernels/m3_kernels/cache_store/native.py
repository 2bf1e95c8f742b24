"""`cache_store` through the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.native_build import array, call


def cache_store_native(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
) -> None:
    """Write the pages; arguments as in the public function, already checked."""
    k, v = k.to(k_pages.dtype), v.to(v_pages.dtype)
    index_k = index_k.to(index_k_pages.dtype)
    call(
        "m3_cache_store",
        array(k),
        array(v),
        array(index_k),
        array(k_pages),
        array(v_pages),
        array(index_k_pages),
        array(slot_mapping),
    )
