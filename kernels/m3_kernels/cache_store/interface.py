"""Contract, validation and dispatch of `cache_store`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.capability import Backend, implementation_for


def cache_store(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
    backend: Backend = "auto",
) -> None:
    """Write the keys, values and index keys of a step's tokens into their pages.

    Values are cast to the dtype of the cache. Slots must differ from each other, else one of the
    writers wins.

    Parameters
    ----------
    k, v : [T, num_kv_heads, head_dim], any strides with a contiguous last dimension
    index_k : [T, index_dim], any strides with a contiguous last dimension
    k_pages, v_pages : [P, num_kv_heads, page_size, head_dim], written in place
    index_k_pages : [P, page_size, index_dim], written in place
    slot_mapping : int64 [T], `page * page_size + offset`; a negative slot stores nothing
    backend : an implementation by name, or "auto" for the best one here

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a slot lies outside the pool (CPU implementations only); nothing is written then
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    device = k.device
    validation.require_shape("k", k, (None, None, None), "[T, num_kv_heads, head_dim]")
    rows, heads, dim = k.shape
    pool = "[P, num_kv_heads, page_size, head_dim]"
    validation.require_shape("k_pages", k_pages, (None, heads, None, dim), pool)
    num_pages, _, page_size, _ = k_pages.shape
    validation.require_shape("v", v, (rows, heads, dim), "[T, num_kv_heads, head_dim]")
    validation.require_shape("v_pages", v_pages, tuple(k_pages.shape), pool)
    validation.require_shape("index_k", index_k, (rows, None), "[T, index_dim]")
    index_pool = (num_pages, page_size, index_k.shape[1])
    validation.require_shape(
        "index_k_pages", index_k_pages, index_pool, "[P, page_size, index_dim]"
    )
    validation.require_dtype("slot_mapping", slot_mapping, torch.int64)
    validation.require_shape("slot_mapping", slot_mapping, (rows,), "[T]")
    validation.require_dense_rows("slot_mapping", slot_mapping)
    validation.require_device("slot_mapping", slot_mapping, device)
    named = {
        "k": k,
        "v": v,
        "index_k": index_k,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "index_k_pages": index_k_pages,
    }
    for name, tensor in named.items():
        validation.require_float(name, tensor)
        validation.require_dense_rows(name, tensor)
        validation.require_device(name, tensor, device)

    implementation = implementation_for("cache_store", backend=backend, device_type=device.type)
    if implementation == "native":
        from m3_kernels.cache_store.native import cache_store_native as run
    elif implementation == "torch":
        from m3_kernels.cache_store.torch_cpu import cache_store_torch as run
    else:
        from m3_kernels.cache_store.reference import cache_store_reference as run
    run(k, v, index_k, k_pages, v_pages, index_k_pages, slot_mapping=slot_mapping)
