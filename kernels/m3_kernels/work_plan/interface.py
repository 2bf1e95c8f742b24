"""Contract, validation and dispatch of the step's work plan."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.tuning import arch_of, kernel_config
from m3_kernels.work_plan.plan import DECODE_ROWS, WorkPlan, WorkPlanBuffers

# Programs of a plan on the CPU, where the interpreter runs them one after another.
CPU_PROGRAMS = 4


def allocate_work_plan(
    *, max_reqs: int, max_rows: int, device: torch.device, num_programs: int | None = None
) -> WorkPlanBuffers:
    """Memory for the plans of every step up to a size.

    Parameters
    ----------
    max_reqs, max_rows : requests and query rows (padding included) of the largest step
    num_programs : programs that share the index keys of requests of decode kind; None for what
        fills the device

    Raises
    ------
    ValueError : a count is out of range
    """
    if num_programs is None:
        num_programs = _programs_of(device)
    for name, value in (("max_reqs", max_reqs), ("max_rows", max_rows)):
        if value < 0:
            raise ValueError(f"{name} must not be negative; got {value}")
    if num_programs < 1:
        raise ValueError(f"num_programs must be at least 1; got {num_programs}")

    def numbers(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    return WorkPlanBuffers(
        cum_blocks=numbers(max_reqs + 1),
        cum_tiles=numbers(max_reqs + 1),
        range_start=numbers(num_programs + 1),
        range_request=numbers(num_programs),
        row_request=numbers(max_rows),
    )


def fill_work_plan(
    buffers: WorkPlanBuffers,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    num_rows: int,
    max_query_len: int,
    max_seq_len: int,
    page_size: int,
    decode_rows: int = DECODE_ROWS,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> WorkPlan:
    """Plan a step, on its device and without waiting for it; may be captured in a CUDA graph.

    Parameters
    ----------
    buffers : filled; the plan is made of views of them
    cu_seqlens_q : int32 [R + 1], as in the other ops
    seq_lens : int32 [R], as in the other ops
    num_rows : T, query rows of the step, padding included
    max_query_len : at least the largest number of query rows of a request
    max_seq_len : at least the largest of `seq_lens`; workspaces are sized by it
    page_size : tokens per page
    decode_rows : requests of at most so many rows are of decode kind; for all steps that share a
        workspace the same, since the kinds' bits agree to rounding only
    backend : "auto" is Triton on CUDA and plain torch elsewhere

    Raises
    ------
    TypeError : a dtype is not int32
    ValueError : a shape or count is not in the contract, or the buffers are too small
    """
    device = seq_lens.device
    validation.require_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    validation.require_dtype("seq_lens", seq_lens, torch.int32)
    validation.require_shape("seq_lens", seq_lens, (None,), "[R]")
    num_reqs = seq_lens.shape[0]
    validation.require_shape("cu_seqlens_q", cu_seqlens_q, (num_reqs + 1,), "[R + 1]")
    validation.require_dense_rows("cu_seqlens_q", cu_seqlens_q)
    validation.require_dense_rows("seq_lens", seq_lens)
    validation.require_device("cu_seqlens_q", cu_seqlens_q, device)
    validation.require_device("buffers", buffers.cum_blocks, device)
    counts = (
        ("num_rows", num_rows),
        ("max_query_len", max_query_len),
        ("max_seq_len", max_seq_len),
    )
    for name, value in counts:
        if value < 0:
            raise ValueError(f"{name} must not be negative; got {value}")
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1; got {page_size}")
    if not 1 <= decode_rows <= DECODE_ROWS:
        raise ValueError(f"decode_rows must be 1 to {DECODE_ROWS}; got {decode_rows}")
    capacity = buffers.cum_blocks.shape[0] - 1, buffers.row_request.shape[0]
    if num_reqs > capacity[0] or num_rows > capacity[1]:
        raise ValueError(
            f"buffers hold {capacity[0]} requests and {capacity[1]} rows; the step has {num_reqs} "
            f"and {num_rows}. Allocate them for the largest step"
        )
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'reference'; got {backend!r}")
    plan = buffers.plan(
        num_reqs=num_reqs,
        num_rows=num_rows,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        page_size=page_size,
        decode_rows=decode_rows,
    )
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from m3_kernels.work_plan.triton import fill_work_plan_triton as run
    else:
        from m3_kernels.work_plan.reference import fill_work_plan_reference as run
    run(plan, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens)
    return plan


def make_work_plan(
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    num_rows: int,
    page_size: int,
    num_programs: int | None = None,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> WorkPlan:
    """Allocate and plan a single step; waits for the device to learn the largest lengths.

    For callers without a session: tests, and ops called without a plan. Arguments as in
    `allocate_work_plan` and `fill_work_plan`.
    """
    num_reqs = seq_lens.shape[0]
    return fill_work_plan(
        allocate_work_plan(
            max_reqs=num_reqs,
            max_rows=num_rows,
            device=seq_lens.device,
            num_programs=num_programs,
        ),
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        num_rows=num_rows,
        max_query_len=int(cu_seqlens_q.diff().max()) if num_reqs else 0,
        max_seq_len=int(seq_lens.max()) if num_reqs else 0,
        page_size=page_size,
        backend=backend,
    )


def _programs_of(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_PROGRAMS
    per_sm = kernel_config("work_plan_ranges", arch=arch_of(device))["PROGRAMS_PER_SM"]
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count
