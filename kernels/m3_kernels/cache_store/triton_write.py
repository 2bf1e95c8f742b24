"""Writing one token into its page, cast to the cache's dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.cache_store.call import CacheStore
from m3_kernels.paged import MSACaches
from m3_kernels.tiles import power_of_two
from m3_kernels.triton_shared import require_e4m3
from m3_kernels.validation import FP8_DTYPES

# The largest numbers of the types that saturate.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FP8_DTYPES}


class Pool(NamedTuple):
    """Pages of keys or values, and the scales of their heads, None where there are none."""

    pages: Any
    stride_page: Any
    stride_head: Any
    stride_slot: Any
    scale: Any
    scale_stride: Any


class IndexPool(NamedTuple):
    """Pages of index keys, and the scale of each key where they are int8, else None."""

    pages: Any
    stride_page: Any
    stride_slot: Any
    scales: Any
    scales_stride: Any


class Heads(NamedTuple):
    """Heads of the rows of a step."""

    start: Any
    stride_row: Any
    stride_head: Any

    @classmethod
    def of(cls, heads: Tensor) -> Heads:
        """Of a tensor [T, heads, dim]."""
        return cls(heads, *heads.stride()[:2])


@triton.jit
def load_heads(heads, row, head, HEADS: tl.constexpr, DIM: tl.constexpr, dim):
    """Numbers of a token's heads, [heads, dim]; zeros past their edges."""
    places = heads.start + row * heads.stride_row
    places = places + head[:, None].to(tl.int64) * heads.stride_head + dim[None, :]
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
def on_grid(values, FRACTION: tl.constexpr, NORMAL: tl.constexpr, SUM: tl.constexpr):
    """fp32 values as the nearest numbers, also fp32, of a narrower type; ties to even.

    FRACTION is its bits of fraction, NORMAL its smallest number that has all of them. What is added
    to SUM, a number of fp32 so large, loses all bits below the type's smallest number.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    DROPPED: tl.constexpr = 23 - FRACTION
    to_even = ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    normal = (magnitude + to_even) >> DROPPED << DROPPED
    small = (tl.abs(values) + SUM) - SUM
    found = tl.where(tl.abs(values) < NORMAL, small.to(tl.int32, bitcast=True), normal)
    found = (found | (bits - magnitude)).to(tl.float32, bitcast=True)
    return tl.where(values == values, found, values)


@triton.jit
def stored(values, LARGEST: tl.constexpr, kind: tl.constexpr):
    """fp32 values as a cache holds them: nearest numbers, ties to even, NaN as NaN; fp8 saturates.

    Triton's own cast to fp8 is left with numbers that are exact. On chips before 8.9 its releases
    before 3.9 round ties away from zero and make -0 of NaN; on others it cuts fp32 to fp16 first,
    and so loses what lies just above a tie.
    """
    values = saturate(values, LARGEST)
    if kind == tl.float8e5:
        # the upper byte of fp16
        half = on_grid(values, 2, 2.0**-14, 192.0).to(tl.float16).to(tl.int16, bitcast=True)
        found = (half >> 8).to(tl.int8).to(kind, bitcast=True)
    elif kind == tl.float8e4nv:
        found = on_grid(values, 3, 2.0**-6, 24576.0).to(kind)
    else:
        found = values.to(kind)
    return found


@triton.jit
def put_heads(
    values,
    pool,
    page,
    slot,
    head,
    dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write keys or values [heads, dim] of one token."""
    values = values.to(tl.float32)
    if pool.scale is not None:
        scale = tl.load(pool.scale + head * pool.scale_stride, mask=head < HEADS, other=1.0)
        values = values * tl.div_rn(1.0, scale)[:, None]
    places = pool.pages + page * pool.stride_page + head.to(tl.int64) * pool.stride_head
    places = (places + slot * pool.stride_slot)[:, None] + dim[None, :]
    inside = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    tl.store(places, stored(values, LARGEST, pool.pages.dtype.element_ty), mask=inside)


@triton.jit
def put_index_key(key, pool, page, slot, dim, DIM: tl.constexpr, LARGEST: tl.constexpr):
    """Write the index key [dim] of one token, with its scale if keys are int8."""
    key = key.to(tl.float32)
    place = pool.pages + page * pool.stride_page + slot * pool.stride_slot
    if pool.scales is not None:
        # Rounded to the dtype it is stored in before it divides, so that both sides use one number.
        scale = tl.div_rn(tl.max(tl.abs(key), axis=0), 127.0)
        scale = scale.to(pool.scales.dtype.element_ty)
        tl.store(pool.scales + page * pool.scales_stride + slot, scale)
        scale = scale.to(tl.float32)
        key = tl.div_rn(key, tl.where(scale > 0, scale, 1.0))
        # The nearest integer, ties to even, by the precision of a large number.
        key = (key + 12582912.0) - 12582912.0
        key = tl.minimum(tl.maximum(key, -127.0), 127.0)
    tl.store(place + dim, stored(key, LARGEST, pool.pages.dtype.element_ty), mask=dim < DIM)


def require_writable(op: str, caches: MSACaches, arch: int) -> None:
    """Refuse caches whose dtype the chip has no cast to.

    Raises
    ------
    NotImplementedError : pages are e4m3 on a GPU below compute capability 8.9
    """
    # the interpreter has one on every chip that it stands for
    if caches.k_pages.device.type != "cpu":
        for name in ("k_pages", "index_k_pages"):
            instead = "KV in float8_e5m2 and index keys in int8"
            require_e4m3(op, name, getattr(caches, name), arch, instead=instead)


def row_arguments(call: CacheStore) -> dict[str, Any]:
    """What a kernel is launched with that stores rows in their pages, by name."""
    caches = call.caches
    heads, page_size, head_dim = caches.k_pages.shape[1:]
    scales = caches.index_k_scales
    index_strides = caches.index_k_pages.stride()[:2]
    scales_stride = 0 if scales is None else scales.stride(0)
    return {
        "k": Heads.of(call.k),
        "v": Heads.of(call.v),
        "index_k": call.index_k,
        "index_stride_row": call.index_k.stride(0),
        "slot_mapping": call.slot_mapping,
        "keys": _pool(caches.k_pages, caches.k_scale),
        "values": _pool(caches.v_pages, caches.v_scale),
        "index_keys": IndexPool(caches.index_k_pages, *index_strides, scales, scales_stride),
        "KV_HEADS": heads,
        "HEADS_PAD": power_of_two(heads),
        "HEAD_DIM": head_dim,
        "HEAD_PAD": power_of_two(head_dim),
        "INDEX_DIM": caches.index_dim,
        "INDEX_PAD": power_of_two(caches.index_dim),
        "PAGE_SIZE": page_size,
        "LARGEST": LARGEST.get(caches.k_pages.dtype, 0.0),
        "LARGEST_INDEX": LARGEST.get(caches.index_k_pages.dtype, 0.0),
    }


def _pool(pages: Tensor, scale: Tensor | None) -> Pool:
    return Pool(pages, *pages.stride()[:3], scale, int(scale is not None and scale.numel() > 1))
