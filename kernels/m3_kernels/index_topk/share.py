"""Which blocks of a step's requests one of several ranks scans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation


@dataclass(frozen=True)
class BlockShare:
    """A range of blocks of each request, which may be empty.

    Attributes
    ----------
    first : int32 [R], the first block of the range
    end : int32 [R], one past its last; blocks that a row does not see are not read

    Raises
    ------
    TypeError : a dtype is not int32
    ValueError : shapes, devices or layouts differ
    """

    first: Tensor
    end: Tensor

    def __post_init__(self) -> None:
        validation.require_shape("share.first", self.first, (None,), "[R]")
        validation.require_shape("share.end", self.end, tuple(self.first.shape), "[R]")
        for name, tensor in (("share.first", self.first), ("share.end", self.end)):
            validation.require_dtype(name, tensor, torch.int32)
            validation.require_dense_rows(name, tensor)
            validation.require_device(name, tensor, self.first.device)

    def become(self, other: BlockShare) -> None:
        """Take another share's numbers, in place: of the same requests, whose lengths changed."""
        self.first.copy_(other.first)
        self.end.copy_(other.end)


def share_of_rank(
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, page_size: int, rank: int, ranks: int
) -> BlockShare:
    """An even part of all (request, block) of a step, in order: one range of each request.

    Requests without rows in the step have no blocks in it.

    Shares of all ranks hold every block once. They differ by one block at most, however many
    requests there are and however long each is; nothing is read back to the host.

    Parameters
    ----------
    cu_seqlens_q : int32 [R + 1], as in `index_topk`
    seq_lens : int32 [R], tokens of each request

    Raises
    ------
    ValueError : no such rank
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be from 0 to {ranks - 1}, one less than ranks; got {rank}")
    blocks = (seq_lens.clamp(min=0) + page_size - 1) // page_size
    blocks = torch.where(cu_seqlens_q.diff() > 0, blocks, 0)
    ends = blocks.cumsum(0)
    total = blocks.sum()

    def cut(at: int) -> Tensor:
        """Where a boundary between ranks falls in each request."""
        behind = total * at // ranks - (ends - blocks)
        return torch.minimum(behind.clamp(min=0), blocks).to(torch.int32)

    return BlockShare(cut(rank), cut(rank + 1))
