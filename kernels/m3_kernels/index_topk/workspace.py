"""Memory that the Triton kernels of `index_topk` keep their scores in."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.tiles import power_of_two
from m3_kernels.work_plan import DECODE_ROWS

# Rows of requests of prefill kind are scored in passes, so that scores never need more than this;
# a pass of few rows would leave most of a GPU idle.
PREFILL_SCORE_BYTES = 256 * 2**20
MIN_PASS_ROWS = 128

# Kernels of the choice differ for contexts of at most so many blocks (tuning, `index_topk_select`).
CHOICE_BLOCKS = (256, 1024)


def decode_slots(max_query_len: int, *, decode_rows: int = DECODE_ROWS) -> int:
    """Rows of scores kept for each request of decode kind: a power of two, at most 8."""
    return power_of_two(max(1, min(max_query_len, decode_rows)))


def allocate_index_topk_workspace(
    *,
    max_reqs: int,
    max_rows: int,
    max_query_len: int,
    max_seq_len: int,
    num_index_heads: int,
    page_size: int,
    device: torch.device,
    decode_rows: int = DECODE_ROWS,
) -> Tensor:
    """Scores of the largest step, fp32, one-dimensional; all layers may share them.

    Parameters
    ----------
    max_reqs, max_rows, max_query_len, max_seq_len : of the largest step, as in its `WorkPlan`
    num_index_heads, page_size : geometry of the layer
    decode_rows : query rows of a request of decode kind, as in its `WorkPlan`

    Returns
    -------
    fp32 [N]: one number for each block of each decode row and head, or 256 MiB for prefill if that
    is more and the step can have so many.
    """
    row = num_index_heads * -(-max_seq_len // page_size)
    numbers = max_reqs * decode_slots(max_query_len, decode_rows=decode_rows) * row
    if max_query_len > decode_rows:
        pass_rows = max(MIN_PASS_ROWS, PREFILL_SCORE_BYTES // (4 * max(row, 1)))
        numbers = max(numbers, min(max_rows, pass_rows) * row)
    return torch.empty(numbers, dtype=torch.float32, device=device)
