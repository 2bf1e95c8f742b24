"""`cache_store` as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.tuning import arch_of, kernel_config
from m3_kernels.validation import FP8_DTYPES

# The largest numbers of the types that saturate.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FP8_DTYPES}


@triton.jit
def store_row(source, target, factor, lane, SIZE: tl.constexpr, LARGEST: tl.constexpr):
    """Cast a row of numbers to the target's dtype; LARGEST is 0 for those which do not saturate."""
    values = tl.load(source + lane, mask=lane < SIZE, other=0.0).to(tl.float32) * factor
    if LARGEST > 0:
        # NaN compares with nothing and so stays.
        values = tl.where(values > LARGEST, LARGEST, values)
        values = tl.where(values < -LARGEST, -LARGEST, values)
    tl.store(target + lane, values.to(target.dtype.element_ty), mask=lane < SIZE)


@triton.jit(do_not_specialize=["num_rows"])
def cache_store_kernel(
    k,
    v,
    index_k,
    k_pages,
    v_pages,
    index_k_pages,
    slot_mapping,
    k_scale,
    v_scale,
    index_k_scales,
    num_rows,
    k_stride_row,
    k_stride_head,
    v_stride_row,
    v_stride_head,
    index_stride_row,
    k_pages_stride_page,
    k_pages_stride_head,
    k_pages_stride_slot,
    v_pages_stride_page,
    v_pages_stride_head,
    v_pages_stride_slot,
    index_pages_stride_page,
    index_pages_stride_slot,
    scales_stride_page,
    k_scale_stride,
    v_scale_stride,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    INT8_INDEX: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST_K: tl.constexpr,
    LARGEST_V: tl.constexpr,
    LARGEST_INDEX: tl.constexpr,
):
    """Program (token): a negative slot stores nothing."""
    row = tl.program_id(0)
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return
    page = slot // PAGE_SIZE
    in_page = slot % PAGE_SIZE
    row = row.to(tl.int64)
    dim = tl.arange(0, HEAD_PAD)
    for kv_head in tl.static_range(KV_HEADS):
        head = tl.full([], kv_head, tl.int64)
        k_factor = 1.0
        v_factor = 1.0
        if HAS_K_SCALE:
            k_factor = tl.div_rn(1.0, tl.load(k_scale + head * k_scale_stride))
        if HAS_V_SCALE:
            v_factor = tl.div_rn(1.0, tl.load(v_scale + head * v_scale_stride))
        k_place = page * k_pages_stride_page + head * k_pages_stride_head
        v_place = page * v_pages_stride_page + head * v_pages_stride_head
        store_row(
            k + row * k_stride_row + head * k_stride_head,
            k_pages + k_place + in_page * k_pages_stride_slot,
            k_factor,
            dim,
            HEAD_DIM,
            LARGEST_K,
        )
        store_row(
            v + row * v_stride_row + head * v_stride_head,
            v_pages + v_place + in_page * v_pages_stride_slot,
            v_factor,
            dim,
            HEAD_DIM,
            LARGEST_V,
        )
    lane = tl.arange(0, INDEX_PAD)
    source = index_k + row * index_stride_row
    target = index_k_pages + page * index_pages_stride_page + in_page * index_pages_stride_slot
    if INT8_INDEX:
        key = tl.load(source + lane, mask=lane < INDEX_DIM, other=0.0).to(tl.float32)
        # Rounded to the dtype it is stored in before it divides, so that both sides use one number.
        scale = tl.div_rn(tl.max(tl.abs(key), axis=0), 127.0)
        scale = scale.to(index_k_scales.dtype.element_ty)
        tl.store(index_k_scales + page * scales_stride_page + in_page, scale)
        scale = scale.to(tl.float32)
        scaled = tl.div_rn(key, tl.where(scale > 0, scale, 1.0))
        # The nearest integer, ties to even, by the precision of a large number.
        rounded = (scaled + 12582912.0) - 12582912.0
        rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
        tl.store(target + lane, rounded.to(tl.int8), mask=lane < INDEX_DIM)
    else:
        store_row(source, target, 1.0, lane, INDEX_DIM, LARGEST_INDEX)


def cache_store_triton(
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
) -> None:
    """Write the pages; arguments as in the public function, already checked."""
    rows, heads, head_dim = k.shape
    if rows == 0:
        return
    index_dim = index_k.shape[1]
    arch = arch_of(k.device)
    for name, pages in (("k_pages", k_pages), ("index_k_pages", index_k_pages)):
        if pages.dtype == torch.float8_e4m3fn and arch < 89 and pages.is_cuda:
            raise NotImplementedError(
                f"cache_store: float8_e4m3fn {name} need compute capability 8.9; this device has "
                f"{arch // 10}.{arch % 10}. Keep KV in float8_e5m2 and index keys in int8 instead"
            )
    cache_store_kernel[(rows,)](
        k,
        v,
        index_k,
        k_pages,
        v_pages,
        index_k_pages,
        slot_mapping,
        k_scale,
        v_scale,
        index_k_scales,
        rows,
        *k.stride()[:2],
        *v.stride()[:2],
        index_k.stride(0),
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *index_k_pages.stride()[:2],
        0 if index_k_scales is None else index_k_scales.stride(0),
        0 if k_scale is None or k_scale.numel() == 1 else 1,
        0 if v_scale is None or v_scale.numel() == 1 else 1,
        HAS_K_SCALE=k_scale is not None,
        HAS_V_SCALE=v_scale is not None,
        INT8_INDEX=index_k_pages.dtype == torch.int8,
        KV_HEADS=heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        INDEX_DIM=index_dim,
        INDEX_PAD=triton.next_power_of_2(index_dim),
        PAGE_SIZE=k_pages.shape[2],
        LARGEST_K=LARGEST.get(k_pages.dtype, 0.0),
        LARGEST_V=LARGEST.get(v_pages.dtype, 0.0),
        LARGEST_INDEX=LARGEST.get(index_k_pages.dtype, 0.0),
        **kernel_config("cache_store", arch=arch),
    )
