"""`sparse_attention` through the Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from m3_kernels.launch import Launch
from m3_kernels.paged import KVPages
from m3_kernels.sparse_attention.call import SparseAttention
from m3_kernels.sparse_attention.triton_decode import sparse_attention_decode_kernel
from m3_kernels.sparse_attention.triton_prefill import sparse_attention_prefill_kernel
from m3_kernels.sparse_attention.workspace import (
    allocate_sparse_attention_workspace,
    attention_config,
    decode_tiles,
)
from m3_kernels.tiles import MIN_TILE, dot_dtype, keys_per_step, power_of_two
from m3_kernels.triton_shared import (
    DOT_DTYPES,
    aligned_for_descriptors,
    dependent_launch,
    descriptor,
    require_e4m3,
)
from m3_kernels.tuning import arch_of
from m3_kernels.work_plan import TILE_ROWS, make_work_plan


def sparse_attention_triton(
    call: SparseAttention, *, arch: int | None = None, use_descriptors: bool | None = None
) -> None:
    """Fill `call.out` and `call.lse`; more as in `launches`, None for the device's chip.

    Raises
    ------
    NotImplementedError : the chip cannot read the pages' dtype
    ValueError : the workspace is too small
    """
    arch = arch_of(call.device) if arch is None else arch
    if call.block_ids.shape[2] == 0:
        call.out.zero_()
        if call.lse is not None:
            call.lse.fill_(-math.inf)
        return
    call = with_memory(call, arch=arch)
    plan = call.plan
    if call.prefill is not None and plan is not None and plan.max_query_len > plan.decode_rows:
        # First, because it may write rows of every request; the launch after it puts those of few
        # rows and those of none right.
        call.prefill(call)
    for launch in launches(call, arch=arch, use_descriptors=use_descriptors):
        launch()


def with_memory(call: SparseAttention, *, arch: int) -> SparseAttention:
    """The call with a plan and a workspace: its own, or what is made and allocated for it alone."""
    rows, q_heads, head_dim = call.q.shape
    kv_heads, page_size = call.kv.k_pages.shape[1:3]
    if call.plan is None:
        plan = make_work_plan(
            cu_seqlens_q=call.step.cu_seqlens_q,
            seq_lens=call.step.seq_lens,
            num_rows=rows,
            page_size=page_size,
        )
        call = replace(call, plan=plan)
    plan = call.plan
    if plan is None or call.workspace is not None:
        return call
    workspace = allocate_sparse_attention_workspace(
        max_reqs=call.step.num_reqs,
        max_query_len=plan.max_query_len,
        decode_rows=plan.decode_rows,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        topk=call.block_ids.shape[2],
        dtype=call.q.dtype,
        kv_dtype=call.kv.k_pages.dtype,
        device=call.device,
        arch=arch,
    )
    return replace(call, workspace=workspace)


def launches(
    call: SparseAttention, *, arch: int, use_descriptors: bool | None = None
) -> Iterator[Launch]:
    """What is launched for a call that has a plan and a workspace, and blocks to choose from.

    The prefill kernel is left out where `call.prefill` runs instead of it.

    Parameters
    ----------
    arch : the chip whose configurations are chosen, major * 10 + minor
    use_descriptors : read pages through tensor descriptors; None as configured

    Raises
    ------
    NotImplementedError : the chip cannot read the pages' dtype
    ValueError : the workspace is too small
    """
    plan, workspace, kv = call.plan, call.workspace, call.kv
    if plan is None or workspace is None:
        raise ValueError("plan and workspace must be given; got None")
    require_e4m3(
        "sparse_attention",
        "pages",
        kv.k_pages,
        arch,
        instead=f"KV in float8_e5m2 or {call.q.dtype}",
    )
    num_reqs = call.step.num_reqs
    rows, q_heads, head_dim = call.q.shape
    kv_heads, page_size = kv.k_pages.shape[1:3]
    topk = call.block_ids.shape[2]
    if rows == 0:
        return
    served: dict[str, Any] = {
        "dtype": call.q.dtype,
        "kv_dtype": kv.k_pages.dtype,
        "max_query_len": min(plan.max_query_len, plan.decode_rows),
        "arch": arch,
    }
    tiles = decode_tiles(
        group=q_heads // kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        topk=topk,
        decode_rows=plan.decode_rows,
        **served,
    )
    units = num_reqs * tiles.row_groups * kv_heads
    needed = units * tiles.segments * tiles.partial_size
    if workspace.partial.numel() < needed or workspace.arrivals.numel() < units:
        raise ValueError(
            f"workspace must hold {needed} partial numbers and {units} arrivals for {num_reqs} "
            f"requests of up to {plan.max_query_len} rows; got {workspace.partial.numel()} and "
            f"{workspace.arrivals.numel()}. Allocate it for the largest step"
        )
    given = {
        **_tensors(call),
        "scale": call.scale,
        "num_reqs": num_reqs,
        "HAS_LSE": call.lse is not None,
        "HAS_K_SCALE": kv.k_scale is not None,
        "HAS_V_SCALE": kv.v_scale is not None,
        "GROUP": q_heads // kv_heads,
        "GROUP_PAD": tiles.group_pad,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": tiles.head_pad,
        "PAGE_SIZE": page_size,
        "TOPK": topk,
        "TOPK_PAD": power_of_two(topk),
        "DOT_DTYPE": DOT_DTYPES[dot_dtype(call.q.dtype, kv.k_pages.dtype)],
        **dependent_launch(call.device, arch),
    }

    config = attention_config("sparse_attention_decode", **served)
    attending = units * tiles.segments
    clearing = -(-rows // config["CLEAR_ROWS"])
    yield Launch(
        sparse_attention_decode_kernel,
        (attending + clearing,),
        {
            **given,
            **_page_tiles(kv, tiles.keys, config, use_descriptors),
            "partial": workspace.partial,
            "arrivals": workspace.arrivals,
            "num_rows": rows,
            "KV_HEADS": kv_heads,
            "HEADS_PAD": power_of_two(q_heads),
            "ROWS": tiles.rows,
            "ROW_GROUPS": tiles.row_groups,
            "LINES": tiles.lines,
            "KEY_AXIS": tiles.key_axis,
            "DECODE_ROWS": plan.decode_rows,
            "SEGMENT_BLOCKS": tiles.segment_blocks,
            "UNION": power_of_two(tiles.rows * tiles.segment_blocks),
            "KEYS": tiles.keys,
            "CLEAR_ROWS": config["CLEAR_ROWS"],
            **_options(config),
        },
    )
    if call.prefill is not None or plan.max_query_len <= plan.decode_rows:
        return
    config = attention_config(
        "sparse_attention_prefill", **{**served, "max_query_len": plan.max_query_len}
    )
    keys = keys_per_step(page_size, config["MAX_KEYS"])
    max_tiles = (rows // TILE_ROWS + 2 * num_reqs) * (TILE_ROWS // config["ROWS"])
    yield Launch(
        sparse_attention_prefill_kernel,
        (kv_heads * max_tiles,),
        {
            **given,
            **_page_tiles(kv, keys, config, use_descriptors),
            "cum_tiles": plan.cum_tiles,
            "max_tiles": max_tiles,
            "ROWS": config["ROWS"],
            "UNION": config["ROWS"] * power_of_two(topk),
            "KEYS": keys,
            **_options(config),
        },
    )


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """What both kernels take of their configuration as it is."""
    names = ("TAIL_STAGES", "CHECK_AT_ONCE", "num_warps", "num_stages")
    return {name: config[name] for name in names}


def _tensors(call: SparseAttention) -> dict[str, Any]:
    """Tensors of both kernels and their strides."""
    k_pages, v_pages = call.kv.k_pages, call.kv.v_pages
    table, lse = call.step.page_table, call.lse
    lse_strides = (0, 0) if lse is None else lse.stride()
    return {
        "q": call.q,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "block_ids": call.block_ids,
        "page_table": table,
        "cu_seqlens_q": call.step.cu_seqlens_q,
        "seq_lens": call.step.seq_lens,
        "k_scale": call.kv.k_scale,
        "v_scale": call.kv.v_scale,
        "out": call.out,
        "lse": lse,
        "q_stride_row": call.q.stride(0),
        "q_stride_head": call.q.stride(1),
        "k_stride_page": k_pages.stride(0),
        "k_stride_head": k_pages.stride(1),
        "k_stride_slot": k_pages.stride(2),
        "v_stride_page": v_pages.stride(0),
        "v_stride_head": v_pages.stride(1),
        "v_stride_slot": v_pages.stride(2),
        "ids_stride_head": call.block_ids.stride(0),
        "ids_stride_row": call.block_ids.stride(1),
        "table_stride": table.stride(0),
        "out_stride_row": call.out.stride(0),
        "out_stride_head": call.out.stride(1),
        "lse_stride_row": lse_strides[0],
        "lse_stride_head": lse_strides[1],
        "k_scale_stride": _head_stride(call.kv.k_scale),
        "v_scale_stride": _head_stride(call.kv.v_scale),
    }


def _head_stride(scale: Tensor | None) -> int:
    """Stride of a scale over KV heads; one scale serves all."""
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def _page_tiles(
    kv: KVPages, keys: int, config: dict[str, Any], use_descriptors: bool | None
) -> dict[str, Any]:
    """The pools as the kernel reads whole tiles: descriptors where they can describe them."""
    wanted = config["USE_DESCRIPTORS"] if use_descriptors is None else use_descriptors
    k_pages, v_pages = kv.k_pages, kv.v_pages
    if wanted and _describable(k_pages, keys) and _describable(v_pages, keys):
        tile = [1, 1, keys, k_pages.shape[3]]
        k_tiles, v_tiles = (
            descriptor(pages, tile, name=name, kept=kv.descriptors)
            for name, pages in (("keys", k_pages), ("values", v_pages))
        )
        return {"k_tiles": k_tiles, "v_tiles": v_tiles, "USE_DESCRIPTORS": True}
    return {"k_tiles": k_pages, "v_tiles": v_pages, "USE_DESCRIPTORS": False}


def _describable(pages: Tensor, keys: int) -> bool:
    """Whether a descriptor gives what pointers give: whole tiles, a power of two inside."""
    head_dim = pages.shape[3]
    padded = head_dim != max(power_of_two(head_dim), MIN_TILE)
    return not padded and pages.shape[2] % keys == 0 and aligned_for_descriptors(pages)
