"""Steps inside CUDA graphs: tensors whose addresses stay, refilled by operations that are recorded.

SGLang records a step once per batch size and replays it with new contents in its own buffers
(`seq_lens`, `req_pool_indices`, `out_cache_loc`). What our kernels read is derived from those
inside the graph, so that a replay needs nothing from the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from m3_kernels.page_table import fill_page_table
from m3_plugin.attention.batch import MSABatch
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_sglang.batch import UniformStep, uniform_starts


@dataclass(frozen=True)
class GraphBuffers:
    """What captured kernels read, as large as the largest step that is captured.

    Attributes
    ----------
    req_to_token : SGLang's own int32 [max_requests, max_context]
    seq_lens : int32 [requests]
    page_table : int32 [requests, max_pages]
    slot_mapping : int64 [rows]
    starts : by query length, int32 [requests + 1], first row of each request and the end of all. A
        graph holds no more than an address of it, so it must stay as long as the graphs
    """

    req_to_token: Tensor
    seq_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    starts: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def allocate(cls, req_to_token: Tensor, *, num_reqs: int, num_rows: int) -> GraphBuffers:
        """Buffers for steps of up to `num_reqs` requests and `num_rows` rows."""
        device = req_to_token.device
        pages = -(-req_to_token.shape[1] // PAGED_BLOCK_SIZE)
        return cls(
            req_to_token=req_to_token,
            seq_lens=torch.ones(num_reqs, dtype=torch.int32, device=device),
            page_table=torch.zeros(num_reqs, pages, dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def batch(self, step: UniformStep, *, num_reqs: int) -> MSABatch:
        """Views for a graph of `num_reqs` requests; what a host integer bounds is at its limit."""
        if step.query_len not in self.starts:
            self.starts[step.query_len] = uniform_starts(
                len(self.seq_lens), query_len=step.query_len, device=self.seq_lens.device
            )
        return MSABatch(
            cu_seqlens_q=self.starts[step.query_len][: num_reqs + 1],
            seq_lens=self.seq_lens[:num_reqs],
            page_table=self.page_table[:num_reqs],
            slot_mapping=self.slot_mapping[: num_reqs * step.query_len],
            max_query_len=step.query_len,
            max_seq_len=self.req_to_token.shape[1],
        )

    def refill(
        self, batch: MSABatch, step: UniformStep, *, seq_lens: Tensor, rows: Tensor, slots: Tensor
    ) -> None:
        """Write the contents of one step into the views of `batch`; device operations only.

        A padded request has the length SGLang fills in, row 0 of `req_to_token` and slot 0, which
        belongs to nobody: it reads what is there and writes where nothing is read. That length is
        1, so it is raised to the request's rows where they are to count, for none lies before
        position 0.

        Parameters
        ----------
        seq_lens : integer [requests], as SGLang counts them
        rows : integer [requests], rows of `req_to_token`
        slots : integer [rows], slots of the step's tokens
        """
        lengths = seq_lens + step.unseen
        if step.query_len > step.unseen + 1:
            lengths = lengths.clamp(min=step.query_len)
        batch.seq_lens.copy_(lengths)
        # as far as each length: the table is as wide as the longest context
        fill_page_table(
            batch.page_table,
            slots=self.req_to_token,
            rows=rows,
            seq_lens=batch.seq_lens,
            page_size=PAGED_BLOCK_SIZE,
        )
        batch.slot_mapping.copy_(slots)
