"""Contract and implementations of `norm_rope_store`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.cache_store import CacheStore
from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.norm_rope_store.parts import HeadNorms
from m3_kernels.paged import NO_FP8, NO_PLANES, MSACaches

NORM_ROPE_STORE = Op[NormRopeStore](
    "norm_rope_store",
    {
        "native": Runs("native:norm_rope_store_native", NO_FP8),
        "torch": Runs("torch_cpu:norm_rope_store_torch", NO_FP8),
        "triton": Runs("triton:norm_rope_store_triton", NO_PLANES),
        "reference": Runs("reference:norm_rope_store_reference"),
    },
)


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
    index_k_low: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """What a layer does between its projections and the choice of blocks, in one step.

    Every head of q, k, index_q and index_k is normalised (Gemma RMSNorm) and its first channels are
    rotated by the angles of their row; then K, V and index keys are written as `cache_store` does.
    Computed in fp32 and rounded once, to the dtype of the argument, before anything is stored.
    Index keys that are stored in two planes are rounded to those alone.

    Parameters
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension, as all that follow
    k, v : [T, num_kv_heads, head_dim]
    index_q : [T, num_index_heads, index_dim]
    index_k : [T, index_dim]
    k_pages, v_pages, index_k_pages, slot_mapping, k_scale, v_scale, index_k_scales, index_k_low :
        as in `cache_store`
    q_weight, k_weight : [head_dim]; one weight w for all heads, which multiplies as 1 + w
    index_q_weight, index_k_weight : [index_dim]
    eps : added to the mean of squares
    cos_sin : [T, rotary_dim], the cosines of each row's rotary_dim / 2 angles and then their sines;
        channel c is rotated with channel c + rotary_dim / 2 (NeoX). One for all layers of a step
    q_out, index_q_out : where results go; None allocates. Not q and index_q themselves
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    q and index_q, normalised and rotated, of the dtype of q and index_q

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a slot lies outside the pool (CPU implementations only); nothing is written then
    NotImplementedError : nothing can run on this device, or not with these dtypes
    """
    caches = MSACaches(
        k_pages, v_pages, index_k_pages, k_scale, v_scale, index_k_scales, index_k_low
    )
    call = NormRopeStore(
        q,
        index_q,
        CacheStore(k, v, index_k, caches, slot_mapping),
        HeadNorms(q_weight, k_weight, index_q_weight, index_k_weight, eps),
        cos_sin,
        q_out=torch.empty_like(q) if q_out is None else q_out,
        index_q_out=torch.empty_like(index_q) if index_q_out is None else index_q_out,
    )
    NORM_ROPE_STORE.run(call, backend=backend)
    return call.q_out, call.index_q_out
