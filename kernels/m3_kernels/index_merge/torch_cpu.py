"""`index_merge` in plain torch: any CPU, no compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.index_merge.call import IndexMerge

NO_BLOCK = torch.iinfo(torch.int32).max
# behind the tiers of blocks: no candidate
LAST_TIER = 3


def index_merge_torch(call: IndexMerge) -> None:
    """Fill `call.out`."""
    topk = call.ids.shape[3]
    # [num_index_heads, T, ranks * topk]; a missing candidate sorts behind all ids
    ids = call.ids.permute(1, 2, 0, 3).flatten(2)
    scores = call.scores.permute(1, 2, 0, 3).flatten(2)
    ids = torch.where(ids < 0, NO_BLOCK, ids)
    own = _own_blocks(call)[:, None]
    tier = torch.where(ids > own - call.num_local_blocks, 1, 2)
    tier = torch.where(ids < call.num_init_blocks, 0, tier)
    tier = torch.where(ids == NO_BLOCK, LAST_TIER, tier)
    # sorted by what decides last first: each sort keeps the order of equals
    worst_first = torch.where(scores.isnan(), -torch.inf, scores)
    order = ids.sort(dim=-1, stable=True).indices
    for key, descending in ((worst_first, True), (tier, False)):
        found = key.gather(-1, order).sort(dim=-1, stable=True, descending=descending).indices
        order = order.gather(-1, found)
    best = ids.gather(-1, order[..., :topk]).sort(dim=-1).values
    call.out.copy_(torch.where((best == NO_BLOCK) | (own < 0), -1, best))


def _own_blocks(call: IndexMerge) -> Tensor:
    """The block each row stands in, int64 [T]; -1 for padding and before position 0."""
    rows = torch.arange(call.ids.shape[2])
    starts = call.cu_seqlens_q.long()
    own = torch.full_like(rows, -1)
    if call.seq_lens.numel():
        request = torch.searchsorted(starts[1:], rows, right=True)
        exists = request < call.seq_lens.numel()
        request = request.clamp(max=call.seq_lens.numel() - 1)
        position = call.seq_lens[request] - (starts[request + 1] - rows)
        block = position.div(call.page_size, rounding_mode="floor")
        own = torch.where(exists & (position >= 0), block, own)
    return own
