"""Contract and implementations of `cache_store`."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.cache_store.call import CacheStore
from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.paged import NO_FP8, NO_PLANES, MSACaches

CACHE_STORE = Op[CacheStore](
    "cache_store",
    {
        "native": Runs("native:cache_store_native", NO_FP8),
        "torch": Runs("torch_cpu:cache_store_torch", NO_FP8),
        "triton": Runs("triton:cache_store_triton", NO_PLANES),
        "reference": Runs("reference:cache_store_reference"),
    },
)


def cache_store(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scales: Tensor | None = None,
    index_k_low: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Write the keys, values and index keys of a step's tokens into their pages.

    Values are cast to the dtype of the cache; fp8 saturates at its largest number. Slots must
    differ from each other, else one of the writers wins.

    Parameters
    ----------
    k, v : [T, num_kv_heads, head_dim], any strides with a contiguous last dimension
    index_k : [T, index_dim], any strides with a contiguous last dimension
    k_pages, v_pages : [P, num_kv_heads, page_size, head_dim], one dtype, written in place;
        float8_e4m3fn and float8_e5m2 with "triton" and "reference" only
    index_k_pages : [P, page_size, index_dim], written in place; fp8 with "triton" and "reference"
        only
    slot_mapping : int64 [T], `page * page_size + offset`; a negative slot stores nothing
    k_scale, v_scale : fp32 [1] or [num_kv_heads], what a stored key or value will be multiplied
        with; "triton" and "reference" only; None is 1
    index_k_scales : floating [P, page_size], written in place; goes with int8 index_k_pages, whose
        keys are stored as `round(key / scale)` with a scale of max(|key|) / 127
    index_k_low : int8 [P, page_size, index_dim], written in place: keys are stored as
        `round(256 * key / scale)`, whose low bytes these are and whose high bytes go to
        index_k_pages. A key that is not finite gets zeros and a scale of NaN
    backend : an implementation by name, or "auto" for the best one here

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a slot lies outside the pool (CPU implementations only); nothing is written then
    NotImplementedError : nothing can run on this device, or not with these dtypes; the reason and
        the alternative are in the message
    """
    caches = MSACaches(
        k_pages, v_pages, index_k_pages, k_scale, v_scale, index_k_scales, index_k_low
    )
    CACHE_STORE.run(CacheStore(k, v, index_k, caches, slot_mapping), backend=backend)
