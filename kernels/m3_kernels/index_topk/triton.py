"""`index_topk` through the Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m3_kernels.index_topk.triton_decode import index_decode_scores_kernel
from m3_kernels.index_topk.triton_prefill import index_prefill_scores_kernel
from m3_kernels.index_topk.triton_select import index_select_kernel
from m3_kernels.index_topk.workspace import (
    allocate_index_topk_workspace,
    decode_slots,
)
from m3_kernels.tiles import MIN_TILE, dot_dtype, keys_per_step, power_of_two
from m3_kernels.triton_shared import (
    DOT_DTYPES,
    aligned_for_descriptors,
    dependent_launch,
    require_e4m3,
)
from m3_kernels.tuning import arch_of, kernel_config
from m3_kernels.work_plan import WorkPlan, make_work_plan


def index_topk_triton(
    index_q: Tensor,
    index_k_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    num_local_blocks: int,
    num_init_blocks: int,
    out: Tensor,
    index_k_scales: Tensor | None = None,
    plan: WorkPlan | None = None,
    workspace: Tensor | None = None,
    arch: int | None = None,
    use_descriptors: bool | None = None,
) -> None:
    """Fill `out`; arguments as in the public function, already checked.

    Parameters
    ----------
    arch : the chip whose configuration is used, major * 10 + minor; None for the device's own
    use_descriptors : read keys through tensor descriptors; None as configured

    Raises
    ------
    NotImplementedError : the chip cannot read the keys' dtype
    ValueError : the plan is of another step, or the workspace is too small
    """
    arch = arch_of(index_q.device) if arch is None else arch
    require_e4m3(
        "index_topk",
        "index keys",
        index_k_pages,
        arch,
        instead="them in int8 with one scale per token, or as the queries are",
    )
    rows, heads, dim = index_q.shape
    page_size = index_k_pages.shape[1]
    topk = out.shape[2]
    num_reqs = seq_lens.shape[0]
    if rows == 0:
        return
    if num_reqs == 0:
        out.fill_(-1)
        return
    if plan is None:
        plan = make_work_plan(
            cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, num_rows=rows, page_size=page_size
        )
    _check_plan(plan, num_reqs=num_reqs, rows=rows, page_size=page_size)
    max_blocks = plan.max_blocks
    slots = decode_slots(plan.max_query_len, decode_rows=plan.decode_rows)
    if workspace is None:
        workspace = allocate_index_topk_workspace(
            max_reqs=num_reqs,
            max_rows=rows,
            max_query_len=plan.max_query_len,
            decode_rows=plan.decode_rows,
            max_seq_len=plan.max_seq_len,
            num_index_heads=heads,
            page_size=page_size,
            device=index_q.device,
        )
    pass_rows = rows
    if max_blocks:
        pass_rows = min(rows, workspace.numel() // (heads * max_blocks))
    needed = num_reqs * slots * heads * max_blocks
    if workspace.numel() < needed or pass_rows == 0:
        raise ValueError(
            f"workspace must hold {max(needed, heads * max_blocks)} scores for {num_reqs} requests "
            f"of up to {plan.max_seq_len} tokens; got {workspace.numel()}. Allocate it for the "
            "largest step"
        )

    dot = dot_dtype(index_q.dtype, index_k_pages.dtype)
    shape = {
        "dot": str(dot).removeprefix("torch."),
        "keys": str(index_k_pages.dtype).removeprefix("torch."),
    }
    tensors = {
        "index_q": index_q,
        "key_pages": index_k_pages,
        # Any pointer will do where it is not read.
        "key_scales": index_k_pages if index_k_scales is None else index_k_scales,
        "page_table": page_table,
        "cu_seqlens_q": cu_seqlens_q,
        "seq_lens": seq_lens,
        "scores": workspace,
        "q_stride_row": index_q.stride(0),
        "q_stride_head": index_q.stride(1),
        "key_stride_page": index_k_pages.stride(0),
        "key_stride_slot": index_k_pages.stride(1),
        "scale_stride": 0 if index_k_scales is None else index_k_scales.stride(0),
        "table_stride": page_table.stride(0),
        "score_stride": max_blocks,
    }
    constants = {
        "HEADS": heads,
        "DIM": dim,
        "DIM_PAD": max(MIN_TILE, power_of_two(dim)),
        "PAGE_SIZE": page_size,
        "HAS_SCALES": index_k_scales is not None,
        "DOT_DTYPE": DOT_DTYPES[dot],
        **dependent_launch(index_q.device, arch),
    }
    choice: dict[str, Any] = {
        "row_request": plan.row_request,
        "cu_seqlens_q": cu_seqlens_q,
        "seq_lens": seq_lens,
        "scores": workspace,
        "out": out,
        "num_reqs": num_reqs,
        "score_stride": max_blocks,
        "out_stride_head": out.stride(0),
        "out_stride_row": out.stride(1),
        "num_local_blocks": num_local_blocks,
        "num_init_blocks": num_init_blocks,
        "HEADS": heads,
        "DECODE_ROWS": plan.decode_rows,
        "PAGE_SIZE": page_size,
        "TOPK": topk,
        "TOPK_PAD": power_of_two(topk),
        # one look-up for a range of contexts: what rows ask for are powers of two
        **kernel_config("index_topk_select", arch=arch, max_blocks=power_of_two(max_blocks)),
        **dependent_launch(index_q.device, arch),
    }

    config = kernel_config("index_topk_decode_scores", arch=arch, **shape)
    keys = keys_per_step(page_size, config["MAX_KEYS"])
    index_decode_scores_kernel[(plan.num_programs,)](
        **tensors,
        **_key_tiles(index_k_pages, keys, constants["DIM_PAD"], config, use_descriptors),
        cum_blocks=plan.cum_blocks,
        range_start=plan.range_start,
        range_request=plan.range_request,
        **constants,
        SLOTS=slots,
        N=max(MIN_TILE, power_of_two(slots * heads)),
        KEYS=keys,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    index_select_kernel[(rows * heads,)](**choice, first_row=0, SLOTS=slots)
    if plan.max_query_len <= plan.decode_rows:
        return

    config = kernel_config("index_topk_prefill_scores", arch=arch, **shape)
    keys = keys_per_step(page_size, config["MAX_KEYS"])
    tile_rows = max(config["ITEMS"], power_of_two(heads)) // heads
    for first_row in range(0, rows, pass_rows):
        end_row = min(rows, first_row + pass_rows)
        tiles = -(-(end_row - first_row) // tile_rows)
        # Few tiles share their blocks out, so that the device is full at short chunks too.
        shares = max(1, min(plan.num_programs // tiles, max_blocks))
        index_prefill_scores_kernel[(tiles, shares)](
            **tensors,
            **_key_tiles(index_k_pages, keys, constants["DIM_PAD"], config, use_descriptors),
            row_request=plan.row_request,
            first_row=first_row,
            end_row=end_row,
            num_reqs=num_reqs,
            **constants,
            DECODE_ROWS=plan.decode_rows,
            M=max(config["ITEMS"], power_of_two(heads)),
            KEYS=keys,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        index_select_kernel[((end_row - first_row) * heads,)](
            **choice, first_row=first_row, SLOTS=0
        )


def _check_plan(plan: WorkPlan, *, num_reqs: int, rows: int, page_size: int) -> None:
    planned = plan.cum_blocks.shape[0] - 1, plan.row_request.shape[0], plan.page_size
    if planned != (num_reqs, rows, page_size):
        raise ValueError(
            f"plan must be of this step's {num_reqs} requests, {rows} rows and pages of "
            f"{page_size}; it has {planned[0]}, {planned[1]} and {planned[2]}"
        )


def _key_tiles(
    pages: Tensor, keys: int, dim_pad: int, config: dict[str, Any], use_descriptors: bool | None
) -> dict[str, Any]:
    """The pool as the kernels read whole tiles: a descriptor where TMA's rules allow one."""
    wanted = config["USE_DESCRIPTORS"] if use_descriptors is None else use_descriptors
    if wanted and aligned_for_descriptors(pages):
        tile = [1, keys, dim_pad]
        tiles = TensorDescriptor(pages, list(pages.shape), list(pages.stride()), tile)
        return {"key_tiles": tiles, "USE_DESCRIPTORS": True}
    return {"key_tiles": pages, "USE_DESCRIPTORS": False}
