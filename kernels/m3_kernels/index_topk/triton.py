"""`index_topk` through the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.index_topk.triton_decode import index_decode_scores_kernel
from m3_kernels.index_topk.triton_prefill import index_prefill_scores_kernel
from m3_kernels.index_topk.triton_select import index_select_kernel
from m3_kernels.index_topk.workspace import (
    allocate_index_topk_workspace,
    decode_slots,
)
from m3_kernels.launch import Launch
from m3_kernels.paged import IndexPages
from m3_kernels.tiles import MIN_TILE, dot_dtype, keys_per_step, power_of_two
from m3_kernels.triton_shared import (
    DOT_DTYPES,
    aligned_for_descriptors,
    dependent_launch,
    descriptor,
    require_e4m3,
)
from m3_kernels.tuning import arch_of, kernel_config
from m3_kernels.work_plan import WorkPlan, make_work_plan


def index_topk_triton(
    call: IndexTopk, *, arch: int | None = None, use_descriptors: bool | None = None
) -> None:
    """Fill `call.out`; further arguments as in `launches`, None for the device's own chip.

    Raises
    ------
    NotImplementedError : the chip cannot read the keys' dtype
    ValueError : the workspace is too small
    """
    arch = arch_of(call.device) if arch is None else arch
    if call.step.num_reqs == 0:
        call.out.fill_(-1)
        return
    for launch in launches(with_memory(call), arch=arch, use_descriptors=use_descriptors):
        launch()


def with_memory(call: IndexTopk) -> IndexTopk:
    """The call with a plan and a workspace: its own, or what is made and allocated for it alone."""
    rows, heads, _ = call.index_q.shape
    page_size = call.keys.index_k_pages.shape[1]
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
    workspace = allocate_index_topk_workspace(
        max_reqs=call.step.num_reqs,
        max_rows=rows,
        max_query_len=plan.max_query_len,
        decode_rows=plan.decode_rows,
        max_seq_len=plan.max_seq_len,
        num_index_heads=heads,
        page_size=page_size,
        device=call.device,
    )
    return replace(call, workspace=workspace)


def launches(
    call: IndexTopk, *, arch: int, use_descriptors: bool | None = None
) -> Iterator[Launch]:
    """What is launched for a call that has a plan and a workspace.

    Parameters
    ----------
    arch : the chip whose configurations are chosen, major * 10 + minor
    use_descriptors : read keys through tensor descriptors; None as configured

    Raises
    ------
    NotImplementedError : the chip cannot read the keys' dtype
    ValueError : the workspace is too small
    """
    plan, workspace, step = call.plan, call.workspace, call.step
    pages, scales = call.keys.index_k_pages, call.keys.index_k_scales
    if plan is None or workspace is None:
        raise ValueError("plan and workspace must be given; got None")
    require_e4m3(
        "index_topk",
        "index keys",
        pages,
        arch,
        instead="them in int8 with one scale per token, or as the queries are",
    )
    rows, heads, dim = call.index_q.shape
    if rows == 0:
        return
    page_size = pages.shape[1]
    slots = decode_slots(plan.max_query_len, decode_rows=plan.decode_rows)
    pass_rows = _rows_of_a_pass(call, plan, workspace, slots)

    dot = dot_dtype(call.index_q.dtype, pages.dtype)
    dim_pad = max(MIN_TILE, power_of_two(dim))
    given = {
        "index_q": call.index_q,
        "key_pages": pages,
        # Any pointer will do where it is not read.
        "key_scales": pages if scales is None else scales,
        "page_table": step.page_table,
        "cu_seqlens_q": step.cu_seqlens_q,
        "seq_lens": step.seq_lens,
        "scores": workspace,
        "q_stride_row": call.index_q.stride(0),
        "q_stride_head": call.index_q.stride(1),
        "key_stride_page": pages.stride(0),
        "key_stride_slot": pages.stride(1),
        "scale_stride": 0 if scales is None else scales.stride(0),
        "table_stride": step.page_table.stride(0),
        "score_stride": plan.max_blocks,
        "HEADS": heads,
        "DIM": dim,
        "DIM_PAD": dim_pad,
        "PAGE_SIZE": page_size,
        "HAS_SCALES": scales is not None,
        "DOT_DTYPE": DOT_DTYPES[dot],
        **dependent_launch(call.device, arch),
    }
    choice: dict[str, Any] = {
        "row_request": plan.row_request,
        "cu_seqlens_q": step.cu_seqlens_q,
        "seq_lens": step.seq_lens,
        "scores": workspace,
        "out": call.out,
        "num_reqs": step.num_reqs,
        "score_stride": plan.max_blocks,
        "out_stride_head": call.out.stride(0),
        "out_stride_row": call.out.stride(1),
        "num_local_blocks": call.num_local_blocks,
        "num_init_blocks": call.num_init_blocks,
        "HEADS": heads,
        "DECODE_ROWS": plan.decode_rows,
        "PAGE_SIZE": page_size,
        "TOPK": call.topk,
        "TOPK_PAD": power_of_two(call.topk),
        **dependent_launch(call.device, arch),
    }
    # one look-up for a range of contexts: what rows ask for are powers of two
    blocks = power_of_two(plan.max_blocks)
    of_few, of_many = (
        choice | kernel_config("index_topk_select", arch=arch, max_blocks=blocks, kind=kind)
        for kind in ("decode", "prefill")
    )
    shape = {
        "dot": str(dot).removeprefix("torch."),
        "keys": str(pages.dtype).removeprefix("torch."),
    }

    config = kernel_config("index_topk_decode_scores", arch=arch, **shape)
    keys = keys_per_step(page_size, config["MAX_KEYS"])
    yield Launch(
        index_decode_scores_kernel,
        (plan.num_programs,),
        {
            **given,
            **_key_tiles(call.keys, keys, dim_pad, config, use_descriptors),
            "cum_blocks": plan.cum_blocks,
            "range_start": plan.range_start,
            "range_request": plan.range_request,
            "SLOTS": slots,
            "N": max(MIN_TILE, power_of_two(slots * heads)),
            "num_warps": config["num_warps"],
            "num_stages": config["num_stages"],
        },
    )
    yield Launch(index_select_kernel, (rows * heads,), {**of_few, "first_row": 0, "SLOTS": slots})
    if plan.max_query_len <= plan.decode_rows:
        return

    config = kernel_config("index_topk_prefill_scores", arch=arch, **shape)
    keys = keys_per_step(page_size, config["MAX_KEYS"])
    tile_lines = max(config["ITEMS"], power_of_two(heads))
    given |= {
        **_key_tiles(call.keys, keys, dim_pad, config, use_descriptors),
        "row_request": plan.row_request,
        "num_reqs": step.num_reqs,
        "DECODE_ROWS": plan.decode_rows,
        "M": tile_lines,
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
    for first_row in range(0, rows, pass_rows):
        end_row = min(rows, first_row + pass_rows)
        tiles = -(-(end_row - first_row) // (tile_lines // heads))
        # Few tiles share their blocks out, so that the device is full at short chunks too.
        shares = max(1, min(plan.num_programs // tiles, plan.max_blocks))
        span = {"first_row": first_row, "end_row": end_row}
        yield Launch(index_prefill_scores_kernel, (tiles, shares), given | span)
        chosen = ((end_row - first_row) * heads,)
        yield Launch(index_select_kernel, chosen, {**of_many, "first_row": first_row, "SLOTS": 0})


def _rows_of_a_pass(call: IndexTopk, plan: WorkPlan, workspace: Tensor, slots: int) -> int:
    """Rows of requests of prefill kind whose scores the workspace holds at a time, at least 1."""
    rows, heads, _ = call.index_q.shape
    row = heads * plan.max_blocks
    found = min(rows, workspace.numel() // row) if row else rows
    needed = call.step.num_reqs * slots * row
    if workspace.numel() < needed or found == 0:
        raise ValueError(
            f"workspace must hold {max(needed, row)} scores for {call.step.num_reqs} requests "
            f"of up to {plan.max_seq_len} tokens; got {workspace.numel()}. Allocate it for the "
            "largest step"
        )
    return found


def _key_tiles(
    index: IndexPages, keys: int, dim_pad: int, config: dict[str, Any], use_descriptors: bool | None
) -> dict[str, Any]:
    """The pool as a kernel reads whole tiles, a descriptor where TMA's rules allow one."""
    wanted = config["USE_DESCRIPTORS"] if use_descriptors is None else use_descriptors
    pages = index.index_k_pages
    described = wanted and aligned_for_descriptors(pages)
    tile = [1, keys, dim_pad]
    return {
        "key_tiles": (
            descriptor(pages, tile, name="keys", kept=index.descriptors) if described else pages
        ),
        "USE_DESCRIPTORS": described,
        "KEYS": keys,
    }
