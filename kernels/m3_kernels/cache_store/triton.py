"""`cache_store` as one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3_kernels.cache_store.triton_write import (
    IndexPool,
    Pool,
    load_heads,
    page_arguments,
    put_heads,
    put_index_key,
    require_writable,
)
from m3_kernels.triton_shared import await_previous_launch, dependent_launch
from m3_kernels.tuning import arch_of, kernel_config


@triton.jit
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
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST_K: tl.constexpr,
    LARGEST_V: tl.constexpr,
    LARGEST_INDEX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token): a negative slot stores nothing."""
    await_previous_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot_mapping + row)
    if place < 0:
        return
    page = place // PAGE_SIZE
    slot = place % PAGE_SIZE
    head = tl.arange(0, HEADS_PAD)
    dim = tl.arange(0, HEAD_PAD)
    keys = Pool(
        k_pages,
        k_pages_stride_page,
        k_pages_stride_head,
        k_pages_stride_slot,
        k_scale,
        k_scale_stride,
    )
    values = Pool(
        v_pages,
        v_pages_stride_page,
        v_pages_stride_head,
        v_pages_stride_slot,
        v_scale,
        v_scale_stride,
    )
    key = load_heads(k + row * k_stride_row, head, k_stride_head, KV_HEADS, HEAD_DIM, dim)
    value = load_heads(v + row * v_stride_row, head, v_stride_head, KV_HEADS, HEAD_DIM, dim)
    put_heads(key, keys, page, slot, head, dim, HAS_K_SCALE, KV_HEADS, HEAD_DIM, LARGEST_K)
    put_heads(value, values, page, slot, head, dim, HAS_V_SCALE, KV_HEADS, HEAD_DIM, LARGEST_V)
    index_keys = IndexPool(
        index_k_pages,
        index_pages_stride_page,
        index_pages_stride_slot,
        index_k_scales,
        scales_stride_page,
    )
    lane = tl.arange(0, INDEX_PAD)
    index_key = tl.load(index_k + row * index_stride_row + lane, mask=lane < INDEX_DIM, other=0.0)
    put_index_key(index_key, index_keys, page, slot, lane, INDEX_DIM, INT8_INDEX, LARGEST_INDEX)


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
    if k.shape[0] == 0:
        return
    arch = arch_of(k.device)
    require_writable("cache_store", k_pages, index_k_pages, arch)
    cache_store_kernel[(k.shape[0],)](
        k=k,
        v=v,
        index_k=index_k,
        k_stride_row=k.stride(0),
        k_stride_head=k.stride(1),
        v_stride_row=v.stride(0),
        v_stride_head=v.stride(1),
        index_stride_row=index_k.stride(0),
        **page_arguments(
            k_pages,
            v_pages,
            index_k_pages,
            slot_mapping=slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            index_k_scales=index_k_scales,
        ),
        # An ordinary launch: what runs before it is the host's. The next may begin early.
        PDL=dependent_launch(k.device, arch)["PDL"],
        **kernel_config("cache_store", arch=arch),
    )
