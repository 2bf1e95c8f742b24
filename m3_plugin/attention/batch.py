"""MSABatch: the one neutral description of an engine step. A host that can fill it is supported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from m3_kernels.work_plan import DECODE_ROWS


@dataclass(frozen=True)
class MSABatch:
    """One scheduler step, in tensors of the host's own metadata where it has them.

    vLLM's are taken as they are; SGLang keeps some of them otherwise, and those are made per step.

    Row i of request r is the query at position `seq_lens[r] - q_len[r] + i`; rows at or past
    `cu_seqlens_q[-1]` are padding. Decode, verify, prefill and chunked prefill rows may be mixed.

    Attributes
    ----------
    cu_seqlens_q : int32 [num_reqs + 1], query rows of request r are [r]..[r + 1]
    seq_lens : int32 [num_reqs], keys in the cache per request, this step's tokens included
    page_table : int32 [num_reqs, max_pages], physical page of each block; tail arbitrary
    slot_mapping : int64 [num_rows], page * page_size + offset per token; negative = do not store
    max_query_len : host integer, upper bound of q_len
    max_seq_len : host integer, upper bound of seq_lens
    requests : how the host calls them, for messages; empty where it does not say
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int
    requests: Sequence[str] = ()

    def __post_init__(self) -> None:
        num_reqs = self.seq_lens.shape[0]
        if self.cu_seqlens_q.shape != (num_reqs + 1,):
            raise ValueError(
                f"cu_seqlens_q must be [num_reqs + 1] = [{num_reqs + 1}]; "
                f"got {list(self.cu_seqlens_q.shape)}"
            )
        if self.page_table.ndim != 2 or self.page_table.shape[0] != num_reqs:
            raise ValueError(
                f"page_table must be [num_reqs, max_pages] with num_reqs={num_reqs}; "
                f"got {list(self.page_table.shape)}"
            )

    @property
    def num_reqs(self) -> int:
        """Requests in the step, padded ones included."""
        return self.seq_lens.shape[0]

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        """ "decode" if no request can have more than one row, "prefill" for all other steps."""
        return "decode" if self.max_query_len == 1 else "prefill"


@dataclass(frozen=True)
class StepCapacity:
    """The largest step a host will ever plan; a session on a GPU allocates for it once.

    Attributes
    ----------
    max_requests : requests in one step, padded ones included
    max_rows : query rows in one step, padding included
    max_seq_len : keys of one request
    decode_rows : query rows of a request that decodes: 1, and those it drafts; requests of more
        rows are prefill. Scratch grows with it, so a host that drafts less says so
    """

    max_requests: int
    max_rows: int
    max_seq_len: int
    decode_rows: int = DECODE_ROWS

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_rows", "max_seq_len", "decode_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.decode_rows > DECODE_ROWS:
            raise ValueError(f"decode_rows must be at most {DECODE_ROWS}; got {self.decode_rows}")

    def require(self, batch: MSABatch) -> None:
        """Refuse a step that is larger than what was announced.

        Raises
        ------
        ValueError : names the quantity, its value and the limit.
        """
        for name, value, limit in (
            ("requests", batch.num_reqs, self.max_requests),
            ("rows", batch.slot_mapping.shape[0], self.max_rows),
            ("max_seq_len", batch.max_seq_len, self.max_seq_len),
        ):
            if value > limit:
                raise ValueError(
                    f"a step has {name}={value}, but the session was made for at most {limit}; "
                    "give the session the host's own limits"
                )
