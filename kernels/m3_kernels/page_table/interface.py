"""Contract, validation and dispatch of the page table of a step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from m3_kernels import validation


def fill_page_table(
    page_table: Tensor,
    *,
    slots: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    page_size: int,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> None:
    """Write the pages of each request's blocks, as far as its length; the rest stays as it is.

    On the device and without waiting for it, so that a CUDA graph made for the longest context may
    hold it: a replay reads and writes what its lengths need.

    Parameters
    ----------
    page_table : int32 [R, blocks], written
    slots : int32 [requests, context], cache slot of each token of each request; the tokens of a
        block lie in one page
    rows : int32 or int64 [R], the row of `slots` of each request
    seq_lens : int32 [R], tokens of each request, at most `blocks * page_size` and `context`
    page_size : tokens per block and page
    backend : "auto" is Triton on CUDA and plain torch elsewhere

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape or `page_size` is not in the contract
    """
    device = page_table.device
    for name, tensor in (("page_table", page_table), ("slots", slots), ("seq_lens", seq_lens)):
        validation.require_dtype(name, tensor, torch.int32)
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows must be torch.int32 or torch.int64; got {rows.dtype}")
    validation.require_shape("page_table", page_table, (None, None), "[R, blocks]")
    validation.require_shape("slots", slots, (None, None), "[requests, context]")
    num_reqs = page_table.shape[0]
    for name, tensor in (("rows", rows), ("seq_lens", seq_lens)):
        validation.require_shape(name, tensor, (num_reqs,), "[R]")
        validation.require_dense_rows(name, tensor)
        validation.require_device(name, tensor, device)
    for name, tensor in (("page_table", page_table), ("slots", slots)):
        validation.require_dense_rows(name, tensor)
    validation.require_device("slots", slots, device)
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1; got {page_size}")
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'reference'; got {backend!r}")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from m3_kernels.page_table.triton import fill_page_table_triton as run
    else:
        from m3_kernels.page_table.reference import fill_page_table_reference as run
    run(page_table, slots=slots, rows=rows, seq_lens=seq_lens, page_size=page_size)
