"""`norm_rope_store` as one Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from m3_kernels.cache_store.triton_write import (
    Heads,
    load_heads,
    put_heads,
    put_index_key,
    require_writable,
    row_arguments,
)
from m3_kernels.launch import Launch
from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.tiles import power_of_two
from m3_kernels.triton_shared import await_previous_launch, dependent_launch
from m3_kernels.tuning import arch_of, kernel_config


@triton.jit
def norm_and_rope(
    heads,
    weight,
    angles,
    eps,
    row,
    head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Heads of one token, [heads, DIM_PAD], normalised and rotated, rounded to their dtype.

    `angles` points to the token's cosines and then its sines.
    """
    HALF: tl.constexpr = ROTARY // 2
    dim = tl.arange(0, DIM_PAD)
    # The channel rotated with this one; loaded again, which is cheaper than to move registers.
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < ROTARY, dim - HALF, dim))
    own = load_heads(heads, row, head, HEADS, DIM, dim).to(tl.float32)
    other = load_heads(heads, row, head, HEADS, DIM, partner).to(tl.float32)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(own * own, axis=1) / DIM + eps))[:, None]
    own_weight = tl.load(weight + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    other_weight = tl.load(weight + partner, mask=dim < DIM, other=0.0).to(tl.float32)
    own = own * factor * (1.0 + own_weight)[None, :]
    other = other * factor * (1.0 + other_weight)[None, :]
    rotates = dim < ROTARY
    angle = tl.minimum(dim, partner)
    cos = tl.load(angles + angle, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(angles + HALF + angle, mask=rotates, other=0.0).to(tl.float32)
    sin = tl.where(dim < HALF, -sin, sin)
    rotated = own * cos[None, :] + other * sin[None, :]
    return tl.where(rotates[None, :], rotated, own).to(heads.start.dtype.element_ty)


@triton.jit
def put_queries(values, target, row, head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Write heads [heads, dim] of one token."""
    dim = tl.arange(0, values.shape[1])
    places = target.start + row * target.stride_row
    places = places + head[:, None].to(tl.int64) * target.stride_head + dim[None, :]
    tl.store(places, values, mask=(head < HEADS)[:, None] & (dim < DIM)[None, :])


@triton.jit
def norm_rope_store_kernel(
    q,
    k,
    v,
    index_q,
    index_k,
    index_stride_row,
    q_out,
    index_q_out,
    keys,
    values,
    index_keys,
    q_weight,
    k_weight,
    index_q_weight,
    index_k_weight,
    eps,
    cos_sin,
    cos_sin_stride,
    slot_mapping,
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
    LARGEST: tl.constexpr,
    LARGEST_INDEX: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, part): what is stored, then index queries, then queries, HEADS at a time.

    q, k, v, index_q and the outputs are `Heads`; `keys` and `values` are a `Pool`, `index_keys` an
    `IndexPool`.
    """
    await_previous_launch(PDL)
    INDEX_PARTS: tl.constexpr = (INDEX_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    part = program % PARTS
    row = (program // PARTS).to(tl.int64)
    angles = cos_sin + row * cos_sin_stride
    if part > INDEX_PARTS:
        head = (part - INDEX_PARTS - 1) * HEADS + tl.arange(0, HEADS)
        queries = norm_and_rope(
            q, q_weight, angles, eps, row, head, Q_HEADS, HEAD_DIM, HEAD_PAD, ROTARY
        )
        put_queries(queries, q_out, row, head, Q_HEADS, HEAD_DIM)
        return
    if part > 0:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        queries = norm_and_rope(
            index_q,
            index_q_weight,
            angles,
            eps,
            row,
            head,
            INDEX_HEADS,
            INDEX_DIM,
            INDEX_PAD,
            ROTARY,
        )
        put_queries(queries, index_q_out, row, head, INDEX_HEADS, INDEX_DIM)
        return
    place = tl.load(slot_mapping + row)
    if place < 0:
        return
    page = place // PAGE_SIZE
    slot = place % PAGE_SIZE
    head = tl.arange(0, HEADS_PAD)
    dim = tl.arange(0, HEAD_PAD)
    key = norm_and_rope(k, k_weight, angles, eps, row, head, KV_HEADS, HEAD_DIM, HEAD_PAD, ROTARY)
    value = load_heads(v, row, head, KV_HEADS, HEAD_DIM, dim)
    put_heads(key, keys, page, slot, head, dim, KV_HEADS, HEAD_DIM, LARGEST)
    put_heads(value, values, page, slot, head, dim, KV_HEADS, HEAD_DIM, LARGEST)
    one = Heads(index_k, index_stride_row, 0)
    index_key = norm_and_rope(
        one, index_k_weight, angles, eps, row, tl.arange(0, 1), 1, INDEX_DIM, INDEX_PAD, ROTARY
    )
    index_key = tl.reshape(index_key, [INDEX_PAD])
    lane = tl.arange(0, INDEX_PAD)
    put_index_key(index_key, index_keys, page, slot, lane, INDEX_DIM, LARGEST_INDEX)


def norm_rope_store_triton(call: NormRopeStore) -> None:
    """Fill the queries and write the pages.

    Raises
    ------
    NotImplementedError : the chip has no cast to the dtype of the pages
    """
    for launch in launches(call, arch=arch_of(call.device)):
        launch()


def launches(call: NormRopeStore, *, arch: int) -> Iterator[Launch]:
    """What is launched for a call, with the configuration of a chip (major * 10 + minor).

    Raises
    ------
    NotImplementedError : the chip has no cast to the dtype of the pages
    """
    stored, norms = call.stored, call.norms
    require_writable("norm_rope_store", stored.caches, arch)
    rows, q_heads, _ = call.q.shape
    if rows == 0:
        return
    index_heads = call.index_q.shape[1]
    config = kernel_config("norm_rope_store", arch=arch)
    heads = min(config["HEADS"], power_of_two(max(q_heads, index_heads)))
    parts = 1 + -(-index_heads // heads) + -(-q_heads // heads)
    arguments = {
        "q": Heads.of(call.q),
        "index_q": Heads.of(call.index_q),
        "q_out": Heads.of(call.q_out),
        "index_q_out": Heads.of(call.index_q_out),
        **row_arguments(stored),
        "q_weight": norms.q,
        "k_weight": norms.k,
        "index_q_weight": norms.index_q,
        "index_k_weight": norms.index_k,
        "eps": norms.eps,
        "cos_sin": call.cos_sin,
        "cos_sin_stride": call.cos_sin.stride(0),
        "Q_HEADS": q_heads,
        "INDEX_HEADS": index_heads,
        "ROTARY": call.cos_sin.shape[1],
        "PARTS": parts,
        # An ordinary launch: what runs before it is the host's. The next may begin early.
        "PDL": dependent_launch(call.device, arch)["PDL"],
        **config,
        "HEADS": heads,
    }
    yield Launch(norm_rope_store_kernel, (rows * parts,), arguments)
