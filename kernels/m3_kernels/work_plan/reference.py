"""The oracle of the work plan: plain torch, any device, nothing read back to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.work_plan.plan import TILE_ROWS, WorkPlan


def fill_work_plan_reference(plan: WorkPlan, *, cu_seqlens_q: Tensor, seq_lens: Tensor) -> None:
    """Fill the tensors of a plan; arguments as in the public function, already checked."""
    lengths = seq_lens.long()
    query_lens = cu_seqlens_q.long().diff()
    blocks = torch.where(
        (query_lens >= 1) & (query_lens <= plan.decode_rows), -(-lengths // plan.page_size), 0
    )
    # Floor division: rows before position 0 have tiles too, so that every row has one.
    first = torch.div(lengths - query_lens, TILE_ROWS, rounding_mode="floor")
    last = torch.div(lengths - 1, TILE_ROWS, rounding_mode="floor")
    tiles = torch.where(query_lens > plan.decode_rows, last - first + 1, 0)

    zero = lengths.new_zeros(1)
    ends = blocks.cumsum(0)
    plan.cum_blocks.copy_(torch.cat([zero, ends]))
    plan.cum_tiles.copy_(torch.cat([zero, tiles.cumsum(0)]))
    programs = torch.arange(plan.num_programs + 1, device=lengths.device)
    starts = programs * plan.cum_blocks[-1].long() // plan.num_programs
    plan.range_start.copy_(starts)
    plan.range_request.copy_(torch.searchsorted(ends, starts[:-1], right=True))
    rows = torch.arange(plan.row_request.shape[0], device=lengths.device)
    plan.row_request.copy_(torch.searchsorted(cu_seqlens_q[1:].long(), rows, right=True))
