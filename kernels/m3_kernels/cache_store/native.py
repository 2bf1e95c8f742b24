"""`cache_store` through the C++ kernels."""

from __future__ import annotations

from m3_kernels.cache_store.call import CacheStore
from m3_kernels.cache_store.torch_cpu import in_int8, in_planes
from m3_kernels.native_build import array
from m3_kernels.native_build import call as run


def cache_store_native(call: CacheStore) -> None:
    """Write the pages."""
    caches, stored_scales = call.caches, call.caches.index_k_scales
    # kept until the call has returned, which is given addresses alone
    k, v = call.k.to(caches.k_pages.dtype), call.v.to(caches.v_pages.dtype)
    index_k, low, scales = call.index_k, None, None
    if stored_scales is None:
        index_k = index_k.to(caches.index_k_pages.dtype)
    elif caches.index_k_low is None:
        index_k, scales = in_int8(index_k, stored_scales.dtype)
    else:
        index_k, low, scales = in_planes(index_k, stored_scales.dtype)
    run(
        "m3_cache_store",
        array(k),
        array(v),
        array(index_k),
        array(caches.k_pages),
        array(caches.v_pages),
        array(caches.index_k_pages),
        None if scales is None else array(scales),
        None if stored_scales is None else array(stored_scales),
        None if low is None else array(low),
        None if caches.index_k_low is None else array(caches.index_k_low),
        array(call.slot_mapping),
    )
