"""Writing one token into its page, cast to the cache's dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.triton_shared import require_e4m3
from m3_kernels.validation import FP8_DTYPES

# The largest numbers of the types that saturate.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FP8_DTYPES}


class Pool(NamedTuple):
    """Pages of keys or values, and the scales of their heads where there are any."""

    pages: Any
    stride_page: Any
    stride_head: Any
    stride_slot: Any
    scale: Any
    scale_stride: Any


class IndexPool(NamedTuple):
    """Pages of index keys, and the scale of each key where they are int8."""

    pages: Any
    stride_page: Any
    stride_slot: Any
    scales: Any
    scales_stride: Any


@triton.jit
def load_heads(source, head, stride_head, HEADS: tl.constexpr, DIM: tl.constexpr, dim):
    """Numbers of a token's heads, [heads, dim]; zeros past their edges."""
    places = source + head[:, None].to(tl.int64) * stride_head + dim[None, :]
    return tl.load(places, mask=(head < HEADS)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def saturate(values, LARGEST: tl.constexpr):
    """Values within what a dtype can hold; LARGEST is 0 for dtypes which do not saturate."""
    if LARGEST > 0:
        # NaN compares with nothing and so stays.
        values = tl.where(values > LARGEST, LARGEST, values)
        values = tl.where(values < -LARGEST, -LARGEST, values)
    return values


@triton.jit
def put_heads(
    values,
    pool,
    page,
    slot,
    head,
    dim,
    HAS_SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write keys or values [heads, dim] of one token."""
    values = values.to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(pool.scale + head * pool.scale_stride, mask=head < HEADS, other=1.0)
        values = values * tl.div_rn(1.0, scale)[:, None]
    values = saturate(values, LARGEST)
    places = pool.pages + page * pool.stride_page + head.to(tl.int64) * pool.stride_head
    places = (places + slot * pool.stride_slot)[:, None] + dim[None, :]
    inside = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    tl.store(places, values.to(pool.pages.dtype.element_ty), mask=inside)


@triton.jit
def put_index_key(
    key, pool, page, slot, dim, DIM: tl.constexpr, INT8: tl.constexpr, LARGEST: tl.constexpr
):
    """Write the index key [dim] of one token, with its scale if keys are int8."""
    key = key.to(tl.float32)
    place = pool.pages + page * pool.stride_page + slot * pool.stride_slot
    if INT8:
        # Rounded to the dtype it is stored in before it divides, so that both sides use one number.
        scale = tl.div_rn(tl.max(tl.abs(key), axis=0), 127.0)
        scale = scale.to(pool.scales.dtype.element_ty)
        tl.store(pool.scales + page * pool.scales_stride + slot, scale)
        scale = scale.to(tl.float32)
        key = tl.div_rn(key, tl.where(scale > 0, scale, 1.0))
        # The nearest integer, ties to even, by the precision of a large number.
        key = (key + 12582912.0) - 12582912.0
        key = tl.minimum(tl.maximum(key, -127.0), 127.0)
    key = saturate(key, LARGEST)
    tl.store(place + dim, key.to(pool.pages.dtype.element_ty), mask=dim < DIM)


def require_writable(op: str, k_pages: Tensor, index_k_pages: Tensor, arch: int) -> None:
    """Refuse caches whose dtype the chip has no cast to.

    Raises
    ------
    NotImplementedError : pages are e4m3 on a GPU below compute capability 8.9
    """
    if k_pages.is_cuda:
        for name, pages in (("k_pages", k_pages), ("index_k_pages", index_k_pages)):
            instead = "KV in float8_e5m2 and index keys in int8"
            require_e4m3(op, name, pages, arch, instead=instead)


def page_arguments(
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    index_k_scales: Tensor | None,
) -> dict[str, Any]:
    """What a kernel that writes into the pages is launched with, by name."""
    heads, page_size, head_dim = k_pages.shape[1:]
    index_dim = index_k_pages.shape[2]
    return {
        "k_pages": k_pages,
        "v_pages": v_pages,
        "index_k_pages": index_k_pages,
        "slot_mapping": slot_mapping,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "index_k_scales": index_k_scales,
        "k_pages_stride_page": k_pages.stride(0),
        "k_pages_stride_head": k_pages.stride(1),
        "k_pages_stride_slot": k_pages.stride(2),
        "v_pages_stride_page": v_pages.stride(0),
        "v_pages_stride_head": v_pages.stride(1),
        "v_pages_stride_slot": v_pages.stride(2),
        "index_pages_stride_page": index_k_pages.stride(0),
        "index_pages_stride_slot": index_k_pages.stride(1),
        "scales_stride_page": 0 if index_k_scales is None else index_k_scales.stride(0),
        "k_scale_stride": 0 if k_scale is None or k_scale.numel() == 1 else 1,
        "v_scale_stride": 0 if v_scale is None or v_scale.numel() == 1 else 1,
        "HAS_K_SCALE": k_scale is not None,
        "HAS_V_SCALE": v_scale is not None,
        "INT8_INDEX": index_k_pages.dtype == torch.int8,
        "KV_HEADS": heads,
        "HEADS_PAD": triton.next_power_of_2(heads),
        "HEAD_DIM": head_dim,
        "HEAD_PAD": triton.next_power_of_2(head_dim),
        "INDEX_DIM": index_dim,
        "INDEX_PAD": triton.next_power_of_2(index_dim),
        "PAGE_SIZE": page_size,
        "LARGEST_K": LARGEST.get(k_pages.dtype, 0.0),
        "LARGEST_V": LARGEST.get(v_pages.dtype, 0.0),
        "LARGEST_INDEX": LARGEST.get(index_k_pages.dtype, 0.0),
    }
