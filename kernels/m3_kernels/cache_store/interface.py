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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scales: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Write the keys, values and index keys of a step's tokens into their pages.

    Values are cast to the dtype of the cache; fp8 saturates at its largest number. Slots must
    differ from each other, else one of the writers wins.

    Parameters
    ----------
    k, v : [T, num_kv_heads, head_dim], any strides with a contiguous last dimension
    index_k : [T, index_dim], any strides with a contiguous last dimension
    k_pages, v_pages : [P, num_kv_heads, page_size, head_dim], written in place; float8_e4m3fn and
        float8_e5m2 with "triton" and "reference" only
    index_k_pages : [P, page_size, index_dim], written in place; fp8 with "triton" and "reference"
        only
    slot_mapping : int64 [T], `page * page_size + offset`; a negative slot stores nothing
    k_scale, v_scale : fp32 [1] or [num_kv_heads], what a stored key or value will be multiplied
        with; "triton" and "reference" only; None is 1
    index_k_scales : floating [P, page_size], written in place; goes with int8 index_k_pages, whose
        keys are stored as `round(key / scale)` with a scale of max(|key|) / 127
    backend : an implementation by name, or "auto" for the best one here

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a slot lies outside the pool (CPU implementations only); nothing is written then
    NotImplementedError : nothing can run on this device, or not with these dtypes; the reason and
        the alternative are in the message
    """
    require_storable(
        k,
        v,
        index_k,
        k_pages,
        v_pages,
        index_k_pages,
        slot_mapping=slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        index_k_scales=index_k_scales,
    )
    implementation = implementation_for("cache_store", backend=backend, device_type=k.device.type)
    scaled = k_scale is not None or v_scale is not None
    dtypes = (k_pages.dtype, v_pages.dtype, index_k_pages.dtype)
    if implementation in ("native", "torch"):
        if scaled or any(dtype in validation.FP8_DTYPES for dtype in dtypes):
            raise NotImplementedError(
                f"cache_store: backend {implementation!r} writes float32, bfloat16 and float16 "
                f"pages without scales, and int8 index keys; got {dtypes}"
                f"{' and scales' if scaled else ''}. Keep the caches in one of these on a CPU, or "
                f"ask for backend='reference'"
            )
        if implementation == "native":
            from m3_kernels.cache_store.native import cache_store_native as run
        else:
            from m3_kernels.cache_store.torch_cpu import cache_store_torch as run
        run(
            k,
            v,
            index_k,
            k_pages,
            v_pages,
            index_k_pages,
            slot_mapping=slot_mapping,
            index_k_scales=index_k_scales,
        )
        return
    if implementation == "triton":
        from m3_kernels.cache_store.triton import cache_store_triton as run_scaled
    else:
        from m3_kernels.cache_store.reference import cache_store_reference as run_scaled
    run_scaled(
        k,
        v,
        index_k,
        k_pages,
        v_pages,
        index_k_pages,
        slot_mapping=slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        index_k_scales=index_k_scales,
    )


def require_storable(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    index_k_scales: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments are in the contract of `cache_store`."""
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
    quantised = {
        "k_pages": validation.FP8_DTYPES,
        "v_pages": validation.FP8_DTYPES,
        "index_k_pages": validation.LOW_PRECISION_DTYPES,
    }
    for name, tensor in named.items():
        if tensor.dtype not in quantised.get(name, ()):
            validation.require_float(name, tensor)
        validation.require_dense_rows(name, tensor)
        validation.require_device(name, tensor, device)

    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            validation.require_dtype(name, scale, torch.float32)
            size = 1 if scale.numel() == 1 else heads
            validation.require_shape(name, scale, (size,), "[1] or [num_kv_heads]")
            validation.require_dense_rows(name, scale)
            validation.require_device(name, scale, device)
    if (index_k_scales is None) == (index_k_pages.dtype == torch.int8):
        given = "none" if index_k_scales is None else "some"
        raise ValueError(
            f"index_k_scales must be given with int8 index_k_pages and only then; got {given} for "
            f"{index_k_pages.dtype} pages"
        )
    if index_k_scales is not None:
        validation.require_float("index_k_scales", index_k_scales)
        validation.require_shape(
            "index_k_scales", index_k_scales, (num_pages, page_size), "[P, page_size]"
        )
        validation.require_dense_rows("index_k_scales", index_k_scales)
        validation.require_device("index_k_scales", index_k_scales, device)
