"""The oracle of `index_merge`: one row and one head at a time, as the order is written."""

from __future__ import annotations

import math

import torch

from m3_kernels.index_merge.call import IndexMerge


def index_merge_reference(call: IndexMerge) -> None:
    """Fill `call.out`."""
    _, heads, _, topk = call.ids.shape
    call.out.fill_(-1)
    for request, seq_len in enumerate(call.seq_lens.tolist()):
        first, last = call.cu_seqlens_q[request : request + 2].tolist()
        for row in range(first, last):
            position = seq_len - (last - row)
            if position < 0:
                continue
            own = position // call.page_size
            for head in range(heads):
                ids = call.ids[:, head, row].flatten().tolist()
                scores = call.scores[:, head, row].flatten().tolist()
                ranked = []
                for block, score in zip(ids, scores, strict=True):
                    if block < 0:
                        continue
                    if block < call.num_init_blocks:
                        tier = 0
                    elif block > own - call.num_local_blocks:
                        tier = 1
                    else:
                        tier = 2
                    ranked.append((tier, math.inf if math.isnan(score) else -score, block))
                best = sorted(block for _, _, block in sorted(ranked)[:topk])
                call.out[head, row, : len(best)] = torch.tensor(best, dtype=torch.int32)
