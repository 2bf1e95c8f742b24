"""Contract, validation and dispatch of `norm_rope_store`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.cache_store.interface import cache_store, require_storable
from m3_kernels.capability import Backend, implementation_for
from m3_kernels.norm_rope_store.parts import Part


def norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    index_q_weight: Tensor,
    index_k_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    q_out: Tensor | None = None,
    index_q_out: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scales: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """What a layer does between its projections and the choice of blocks, in one step.

    Every head of q, k, index_q and index_k is normalised (Gemma RMSNorm) and its first channels are
    turned by the angles of their row; then K, V and index keys are written as `cache_store` does.
    Computed in fp32 and rounded once, to the dtype of the argument, before anything is stored.

    Parameters
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension, as all that follow
    k, v : [T, num_kv_heads, head_dim]
    index_q : [T, num_index_heads, index_dim]
    index_k : [T, index_dim]
    k_pages, v_pages, index_k_pages, slot_mapping, k_scale, v_scale, index_k_scales : as in
        `cache_store`
    q_weight, k_weight : [head_dim]; one weight w for all heads, which multiplies as 1 + w
    index_q_weight, index_k_weight : [index_dim]
    eps : added to the mean of squares
    cos_sin : [T, rotary_dim], the cosines of each row's rotary_dim / 2 angles and then their sines;
        channel c turns with channel c + rotary_dim / 2 (NeoX). One for all layers of a step
    q_out, index_q_out : where results go; None allocates. Not q and index_q themselves
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    q and index_q, normalised and turned, of the dtype of q and index_q

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a slot lies outside the pool (CPU implementations only); nothing is written then
    NotImplementedError : nothing can run on this device, or not with these dtypes
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
    rows, _, head_dim = k.shape
    index_dim = index_k.shape[1]
    validation.require_shape("q", q, (rows, None, head_dim), "[T, num_q_heads, head_dim]")
    index_words = "[T, num_index_heads, index_dim]"
    validation.require_shape("index_q", index_q, (rows, None, index_dim), index_words)
    q_out = torch.empty_like(q) if q_out is None else q_out
    index_q_out = torch.empty_like(index_q) if index_q_out is None else index_q_out
    for name, out, source in (("q_out", q_out, q), ("index_q_out", index_q_out, index_q)):
        validation.require_dtype(name, out, source.dtype)
        validation.require_shape(name, out, tuple(source.shape), f"as {name.removesuffix('_out')}")
        if source.numel() and out.data_ptr() == source.data_ptr():
            raise ValueError(f"{name} must not be {name.removesuffix('_out')} itself")
    weights = {
        "q_weight": (q_weight, head_dim),
        "k_weight": (k_weight, head_dim),
        "index_q_weight": (index_q_weight, index_dim),
        "index_k_weight": (index_k_weight, index_dim),
    }
    for name, (weight, size) in weights.items():
        words = "[index_dim]" if name.startswith("index") else "[head_dim]"
        validation.require_shape(name, weight, (size,), words)
    validation.require_shape("cos_sin", cos_sin, (rows, None), "[T, rotary_dim]")
    rotary_dim = cos_sin.shape[1]
    if rotary_dim % 2 or rotary_dim > min(head_dim, index_dim):
        raise ValueError(
            f"cos_sin must have an even number of columns, at most head_dim {head_dim} and "
            f"index_dim {index_dim}; got {rotary_dim}"
        )
    named = {name: weight for name, (weight, _) in weights.items()}
    named |= {"q": q, "index_q": index_q, "q_out": q_out, "index_q_out": index_q_out}
    named["cos_sin"] = cos_sin
    for name, tensor in named.items():
        validation.require_float(name, tensor)
        validation.require_dense_rows(name, tensor)
        validation.require_device(name, tensor, k.device)

    implementation = implementation_for(
        "norm_rope_store", backend=backend, device_type=k.device.type
    )
    if implementation == "triton":
        from m3_kernels.norm_rope_store.triton import norm_rope_store_triton

        norm_rope_store_triton(
            q,
            k,
            v,
            index_q,
            index_k,
            k_pages,
            v_pages,
            index_k_pages,
            q_weight=q_weight,
            k_weight=k_weight,
            index_q_weight=index_q_weight,
            index_k_weight=index_k_weight,
            eps=eps,
            cos_sin=cos_sin,
            slot_mapping=slot_mapping,
            q_out=q_out,
            index_q_out=index_q_out,
            k_scale=k_scale,
            v_scale=v_scale,
            index_k_scales=index_k_scales,
        )
        return q_out, index_q_out
    if implementation == "native":
        from m3_kernels.norm_rope_store.native import norm_and_rope_native as norm_and_rope
    elif implementation == "torch":
        from m3_kernels.norm_rope_store.torch_cpu import norm_and_rope_torch as norm_and_rope
    else:
        from m3_kernels.norm_rope_store.reference import norm_and_rope_reference as norm_and_rope
    keys, index_keys = torch.empty_like(k), torch.empty_like(index_k)
    parts = (
        Part(q, q_weight, q_out),
        Part(k, k_weight, keys),
        Part(index_q, index_q_weight, index_q_out),
        Part(index_k[:, None], index_k_weight, index_keys[:, None]),
    )
    norm_and_rope(parts, cos_sin=cos_sin, eps=eps)
    cache_store(
        keys,
        v,
        index_keys,
        k_pages,
        v_pages,
        index_k_pages,
        slot_mapping=slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        index_k_scales=index_k_scales,
        backend=implementation,
    )
    return q_out, index_q_out
