"""`norm_rope_store` as one Triton kernel."""

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
from m3_kernels.tiles import power_of_two
from m3_kernels.triton_shared import await_previous_launch, dependent_launch
from m3_kernels.tuning import arch_of, kernel_config


@triton.jit
def norm_and_rope(
    source,
    weight,
    angles,
    eps,
    head,
    stride_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Heads of one token, [heads, DIM_PAD], normalised and turned, rounded to the source's dtype.

    `angles` points to the token's cosines and then its sines.
    """
    HALF: tl.constexpr = ROTARY // 2
    dim = tl.arange(0, DIM_PAD)
    # The channel that turns with this one; loaded again, which is cheaper than to move registers.
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < ROTARY, dim - HALF, dim))
    own = load_heads(source, head, stride_head, HEADS, DIM, dim).to(tl.float32)
    other = load_heads(source, head, stride_head, HEADS, DIM, partner).to(tl.float32)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(own * own, axis=1) / DIM + eps))[:, None]
    own_weight = tl.load(weight + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    other_weight = tl.load(weight + partner, mask=dim < DIM, other=0.0).to(tl.float32)
    own = own * factor * (1.0 + own_weight)[None, :]
    other = other * factor * (1.0 + other_weight)[None, :]
    turns = dim < ROTARY
    angle = tl.minimum(dim, partner)
    cos = tl.load(angles + angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(angles + HALF + angle, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(dim < HALF, -sin, sin)
    turned = own * cos[None, :] + other * sin[None, :]
    return tl.where(turns[None, :], turned, own).to(source.dtype.element_ty)


@triton.jit
def put_queries(values, target, head, stride_head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Write heads [heads, dim] of one token."""
    dim = tl.arange(0, values.shape[1])
    places = target + head[:, None].to(tl.int64) * stride_head + dim[None, :]
    tl.store(places, values, mask=(head < HEADS)[:, None] & (dim < DIM)[None, :])


@triton.jit
def norm_rope_store_kernel(
    q,
    k,
    v,
    index_q,
    index_k,
    q_out,
    index_q_out,
    k_pages,
    v_pages,
    index_k_pages,
    q_weight,
    k_weight,
    index_q_weight,
    index_k_weight,
    cos_sin,
    slot_mapping,
    k_scale,
    v_scale,
    index_k_scales,
    eps,
    q_stride_row,
    q_stride_head,
    k_stride_row,
    k_stride_head,
    v_stride_row,
    v_stride_head,
    index_q_stride_row,
    index_q_stride_head,
    index_k_stride_row,
    q_out_stride_row,
    q_out_stride_head,
    index_q_out_stride_row,
    index_q_out_stride_head,
    cos_sin_stride,
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
    Q_HEADS: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST_K: tl.constexpr,
    LARGEST_V: tl.constexpr,
    LARGEST_INDEX: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, part): what is stored, then index queries, then queries, HEADS at a time."""
    await_previous_launch(PDL)
    INDEX_PARTS: tl.constexpr = (INDEX_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    part = program % PARTS
    row = (program // PARTS).to(tl.int64)
    angles = cos_sin + row * cos_sin_stride
    if part > INDEX_PARTS:
        head = (part - INDEX_PARTS - 1) * HEADS + tl.arange(0, HEADS)
        queries = norm_and_rope(
            q + row * q_stride_row,
            q_weight,
            angles,
            eps,
            head,
            q_stride_head,
            Q_HEADS,
            HEAD_DIM,
            HEAD_PAD,
            ROTARY,
        )
        target = q_out + row * q_out_stride_row
        put_queries(queries, target, head, q_out_stride_head, Q_HEADS, HEAD_DIM)
        return
    if part > 0:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        queries = norm_and_rope(
            index_q + row * index_q_stride_row,
            index_q_weight,
            angles,
            eps,
            head,
            index_q_stride_head,
            INDEX_HEADS,
            INDEX_DIM,
            INDEX_PAD,
            ROTARY,
        )
        target = index_q_out + row * index_q_out_stride_row
        put_queries(queries, target, head, index_q_out_stride_head, INDEX_HEADS, INDEX_DIM)
        return
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
    key = norm_and_rope(
        k + row * k_stride_row,
        k_weight,
        angles,
        eps,
        head,
        k_stride_head,
        KV_HEADS,
        HEAD_DIM,
        HEAD_PAD,
        ROTARY,
    )
    value = load_heads(v + row * v_stride_row, head, v_stride_head, KV_HEADS, HEAD_DIM, dim)
    put_heads(key, keys, page, slot, head, dim, HAS_K_SCALE, KV_HEADS, HEAD_DIM, LARGEST_K)
    put_heads(value, values, page, slot, head, dim, HAS_V_SCALE, KV_HEADS, HEAD_DIM, LARGEST_V)
    index_key = norm_and_rope(
        index_k + row * index_k_stride_row,
        index_k_weight,
        angles,
        eps,
        tl.arange(0, 1),
        0,
        1,
        INDEX_DIM,
        INDEX_PAD,
        ROTARY,
    )
    index_keys = IndexPool(
        index_k_pages,
        index_pages_stride_page,
        index_pages_stride_slot,
        index_k_scales,
        scales_stride_page,
    )
    index_key = tl.reshape(index_key, [INDEX_PAD])
    lane = tl.arange(0, INDEX_PAD)
    put_index_key(index_key, index_keys, page, slot, lane, INDEX_DIM, INT8_INDEX, LARGEST_INDEX)


def norm_rope_store_triton(
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
    q_out: Tensor,
    index_q_out: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scales: Tensor | None = None,
) -> None:
    """Fill the outputs and the pages; arguments as in the public function, already checked."""
    rows, q_heads, _ = q.shape
    if rows == 0:
        return
    arch = arch_of(k.device)
    require_writable("norm_rope_store", k_pages, index_k_pages, arch)
    index_heads = index_q.shape[1]
    config = kernel_config("norm_rope_store", arch=arch)
    heads = min(config["HEADS"], power_of_two(max(q_heads, index_heads)))
    parts = 1 + -(-index_heads // heads) + -(-q_heads // heads)
    norm_rope_store_kernel[(rows * parts,)](
        q=q,
        k=k,
        v=v,
        index_q=index_q,
        index_k=index_k,
        q_out=q_out,
        index_q_out=index_q_out,
        q_weight=q_weight,
        k_weight=k_weight,
        index_q_weight=index_q_weight,
        index_k_weight=index_k_weight,
        cos_sin=cos_sin,
        eps=eps,
        q_stride_row=q.stride(0),
        q_stride_head=q.stride(1),
        k_stride_row=k.stride(0),
        k_stride_head=k.stride(1),
        v_stride_row=v.stride(0),
        v_stride_head=v.stride(1),
        index_q_stride_row=index_q.stride(0),
        index_q_stride_head=index_q.stride(1),
        index_k_stride_row=index_k.stride(0),
        q_out_stride_row=q_out.stride(0),
        q_out_stride_head=q_out.stride(1),
        index_q_out_stride_row=index_q_out.stride(0),
        index_q_out_stride_head=index_q_out.stride(1),
        cos_sin_stride=cos_sin.stride(0),
        **page_arguments(
            k_pages,
            v_pages,
            index_k_pages,
            slot_mapping=slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            index_k_scales=index_k_scales,
        ),
        Q_HEADS=q_heads,
        INDEX_HEADS=index_heads,
        ROTARY=cos_sin.shape[1],
        HEADS=heads,
        PARTS=parts,
        # An ordinary launch: what runs before it is the host's. The next may begin early.
        PDL=dependent_launch(k.device, arch)["PDL"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
