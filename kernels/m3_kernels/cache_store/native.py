"""`cache_store` through the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.cache_store.torch_cpu import in_int8
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
    index_k_scales: Tensor | None,
) -> None:
    """Write the pages; arguments as in the public function, already checked."""
    k, v = k.to(k_pages.dtype), v.to(v_pages.dtype)
    scales = None
    if index_k_scales is None:
        index_k = index_k.to(index_k_pages.dtype)
    else:
        index_k, scales = in_int8(index_k, index_k_scales.dtype)
    call(
        "m3_cache_store",
        array(k),
        array(v),
        array(index_k),
        array(k_pages),
        array(v_pages),
        array(index_k_pages),
        None if scales is None else array(scales),
        None if index_k_scales is None else array(index_k_scales),
        array(slot_mapping),
    )
