"""SGLang's ForwardBatch -> MSABatch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from m3_plugin.batch import MSABatch
from m3_plugin.config import PAGED_BLOCK_SIZE

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor


def msa_batch(forward_batch: ForwardBatch, *, req_to_token: Tensor) -> MSABatch:
    """Translate one step: decode, prefill, chunked prefill behind a cached prefix, or a mix.

    Parameters
    ----------
    forward_batch : lengths of the step; `seq_lens` counts the step's own tokens
    req_to_token : int32 [max_requests, max_context], cache slot of each token of each request

    Raises
    ------
    NotImplementedError : a speculative step, whose lengths mean something else.
    """
    mode = forward_batch.forward_mode
    if mode.is_decode():
        cu_seqlens_q = torch.arange(
            forward_batch.batch_size + 1, dtype=torch.int32, device=req_to_token.device
        )
        max_query_len = 1
    elif mode.is_extend() and not (mode.is_target_verify() or mode.is_draft_extend_v2()):
        lengths = forward_batch.extend_seq_lens
        host_lengths = forward_batch.extend_seq_lens_cpu
        assert lengths is not None
        assert host_lengths is not None
        cu_seqlens_q = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        max_query_len = max(host_lengths, default=0)
    else:
        raise NotImplementedError(f"m3-plugin does not serve {mode.name} steps yet")
    max_seq_len = _max_seq_len(forward_batch)
    return MSABatch(
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=forward_batch.seq_lens.to(torch.int32),
        page_table=page_table(
            req_to_token, forward_batch.req_pool_indices, max_seq_len=max_seq_len
        ),
        slot_mapping=forward_batch.out_cache_loc.to(torch.int64),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )


def page_table(req_to_token: Tensor, rows: Tensor, *, max_seq_len: int) -> Tensor:
    """Page of each 128-token block of each request: int32 [requests, blocks].

    SGLang's paged allocator gives a request whole pages, so the slot of a block's first token
    tells the page of the block.
    """
    first_slots = req_to_token[rows, :max_seq_len:PAGED_BLOCK_SIZE]
    return (first_slots // PAGED_BLOCK_SIZE).to(torch.int32)


def _max_seq_len(forward_batch: Any) -> int:
    """Longest request of the step, from the host's mirror of the lengths."""
    lengths = forward_batch.seq_lens_cpu
    if lengths is None:
        lengths = forward_batch.seq_lens.cpu()
    return int(lengths.max()) if len(lengths) else 0
