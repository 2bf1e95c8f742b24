"""SGLang's ForwardBatch -> MSABatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from m3_plugin.attention.batch import MSABatch
from m3_plugin.model.config import PAGED_BLOCK_SIZE

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class UniformStep:
    """A step in which every request has the same number of rows.

    Attributes
    ----------
    query_len : rows of a request
    unseen : of the keys each row can see, those that SGLang's `seq_lens` does not count: the
        drafted tokens of a verify step, or those that a drafting step has added so far
    """

    query_len: int
    unseen: int


def uniform_step(forward_batch: ForwardBatch, *, drafted: int = 0) -> UniformStep | None:
    """The step as a uniform one; None for a step whose requests bring lengths of their own.

    Parameters
    ----------
    drafted : in a drafting step, tokens drafted before this one plus one; 0 in any other
    """
    mode = forward_batch.forward_mode
    if mode.is_decode():
        return UniformStep(query_len=1, unseen=drafted)
    if mode.is_target_verify():
        assert forward_batch.spec_info is not None
        rows: int = forward_batch.spec_info.draft_token_num  # pyright: ignore
        return UniformStep(query_len=rows, unseen=rows)
    return None


def captured_step(forward_batch: ForwardBatch) -> UniformStep | None:
    """The step as a graph of it is captured; None for steps of which none can be.

    A graph of the draft model's extend step gives every request the same rows; eager ones may give
    each its own.
    """
    if not forward_batch.forward_mode.is_draft_extend_v2():
        return uniform_step(forward_batch)
    assert forward_batch.input_ids is not None
    return UniformStep(query_len=len(forward_batch.input_ids) // forward_batch.batch_size, unseen=0)


def msa_batch(
    forward_batch: ForwardBatch,
    *,
    req_to_token: Tensor,
    drafted: int = 0,
    slot_mapping: Tensor | None = None,
) -> MSABatch:
    """Translate one eager step.

    Decode, prefill, chunked prefill behind a cached prefix, a mix of them, verification of a chain
    of drafts, and the draft model's own steps. Each row of a verified chain is a query of its own
    at its own position, with its own selection.

    Parameters
    ----------
    forward_batch : lengths of the step; `seq_lens` counts the step's own tokens, except those of a
        verify step and of drafting steps
    req_to_token : int32 [max_requests, max_context], cache slot of each token of each request
    drafted : in a drafting step, tokens drafted before this one plus one; 0 in any other
    slot_mapping : slots of the step's tokens where they are not `forward_batch.out_cache_loc`
    """
    step = uniform_step(forward_batch, drafted=drafted)
    if step is not None:
        cu_seqlens_q = uniform_starts(
            forward_batch.batch_size, query_len=step.query_len, device=req_to_token.device
        )
        max_query_len, unseen = step.query_len, step.unseen
    else:
        lengths = forward_batch.extend_seq_lens
        host_lengths = forward_batch.extend_seq_lens_cpu
        assert lengths is not None
        assert host_lengths is not None
        cu_seqlens_q = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        max_query_len, unseen = max((int(n) for n in host_lengths), default=0), 0
    slots = forward_batch.out_cache_loc if slot_mapping is None else slot_mapping
    assert slots is not None
    max_seq_len = _max_seq_len(forward_batch, capacity=req_to_token.shape[1], unseen=unseen)
    return MSABatch(
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=(forward_batch.seq_lens + unseen).to(torch.int32),
        page_table=page_table(
            req_to_token, forward_batch.req_pool_indices, max_seq_len=max_seq_len
        ),
        slot_mapping=slots.to(torch.int64),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        requests=forward_batch.rids or (),
    )


def uniform_starts(num_reqs: int, *, query_len: int, device: torch.device) -> Tensor:
    """First row of each request, and one past the last: int32 [num_reqs + 1]."""
    return torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * query_len


def page_table(req_to_token: Tensor, rows: Tensor, *, max_seq_len: int) -> Tensor:
    """Page of each 128-token block of each request: int32 [requests, blocks].

    SGLang's paged allocator gives a request whole pages, so the slot of a block's first token
    tells the page of the block.
    """
    first_slots = req_to_token[rows, :max_seq_len:PAGED_BLOCK_SIZE]
    return (first_slots // PAGED_BLOCK_SIZE).to(torch.int32)


def paged(slots: Tensor) -> Tensor:
    """[pages * 128, heads, dim] -> [pages, heads, 128, dim], a view."""
    return slots.unflatten(0, (-1, PAGED_BLOCK_SIZE)).transpose(1, 2)


def _max_seq_len(forward_batch: Any, *, capacity: int, unseen: int) -> int:
    """No less than the longest request of the step, from the host's mirror of the lengths.

    A step without the mirror gets the capacity, for to ask the device would be to wait for it.
    """
    lengths = forward_batch.seq_lens_cpu
    if lengths is None:
        return capacity
    return (int(lengths.max()) if len(lengths) else 0) + unseen
