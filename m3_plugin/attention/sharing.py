"""The scan of index keys, shared out over the ranks that share attention heads.

Every rank keeps all index keys and, without this, reads all of them in every decode step: the one
cost of attention that more ranks do not make smaller. Shared out, a rank scores an even part of the
blocks for the index heads of all ranks, and keeps the best of these. One exchange later every rank
knows the candidates of all and merges those of its own heads, in the order that `index_topk` has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels.index_topk import BlockShare, share_of_rank
from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.attention.batch import MSABatch
from m3_plugin.model.config import MSAConfig, local_heads
from m3_plugin.settings import Settings

# [n, ...] of this rank -> [ranks * n, ...] of all ranks in order, on each of them. In fp32, which
# every host's exchange knows: numbers are handed on, and nothing is computed with them.
Gather = Callable[[Tensor], Tensor]


def shares_scans(settings: Settings, ranks: int) -> bool:
    """Whether scans are shared out, so that every rank has to have all index queries."""
    return settings.index_sharing == "scan" and ranks > 1


def index_heads_of_rank(num_index_heads: int, *, rank: int, ranks: int) -> slice:
    """Which index heads choose for the KV heads of a rank: its own, or one that ranks share."""
    first = rank * num_index_heads // ranks
    return slice(first, first + local_heads(num_index_heads, ranks))


@dataclass(frozen=True)
class IndexSharing:
    """How one rank takes part.

    Attributes
    ----------
    rank, ranks : this one's place among those that share the heads of each attention layer
    num_index_heads : of the model
    gather : the host's exchange among these ranks
    from_tokens : host bound on tokens of a step from which its scan is shared
    """

    rank: int
    ranks: int
    num_index_heads: int
    gather: Gather
    from_tokens: int

    @property
    def own_heads(self) -> slice:
        """Index heads of this rank among all."""
        return index_heads_of_rank(self.num_index_heads, rank=self.rank, ranks=self.ranks)

    def describe(self) -> str:
        """One clause for a log."""
        return (
            f"scans of index keys are shared by {self.ranks} ranks in steps of decoding from "
            f"{self.from_tokens:,} tokens on"
        )

    def takes(self, batch: MSABatch) -> bool:
        """Whether the scan of a step is shared: the same on all ranks, from host numbers alone.

        Steps with prompts in them are not: there scores cost multiplications, of which each rank
        does those of its own heads, and not reads.
        """
        if batch.max_query_len > DECODE_ROWS:
            return False
        return batch.num_reqs * batch.max_seq_len >= self.from_tokens

    def share(self, batch: MSABatch, *, page_size: int) -> BlockShare:
        """What this rank scans of a step."""
        return share_of_rank(
            batch.cu_seqlens_q,
            batch.seq_lens,
            page_size=page_size,
            rank=self.rank,
            ranks=self.ranks,
        )

    def exchange(self, candidates: Candidates) -> Candidates:
        """This rank's candidates of all index heads -> those of all ranks for its own heads.

        Returns
        -------
        ids, scores : [ranks, own index heads, rows, topk]
        """
        found = self.gather(candidates.packed).unflatten(0, (self.ranks, 2))
        found = found[:, :, self.own_heads]
        return Candidates(found.transpose(0, 1))


@dataclass(frozen=True)
class Candidates:
    """Ids and scores in one tensor, which one exchange carries.

    Attributes
    ----------
    packed : fp32 [2, ..., num_index_heads, rows, topk]: the bits of the ids, and the scores
    """

    packed: Tensor

    @classmethod
    def empty(cls, like: Tensor, *, num_index_heads: int, rows: int, topk: int) -> Candidates:
        """Room for one rank's, on the device of a tensor."""
        shape = (2, num_index_heads, rows, topk)
        return cls(torch.empty(shape, dtype=torch.float32, device=like.device))

    @property
    def ids(self) -> Tensor:
        """int32 [..., num_index_heads, rows, topk], a view."""
        return self.packed[0].view(torch.int32)

    @property
    def scores(self) -> Tensor:
        """fp32, likewise."""
        return self.packed[1]


def make_sharing(
    msa: MSAConfig, settings: Settings, *, rank: int, ranks: int, gather: Gather | None
) -> IndexSharing | None:
    """How this rank shares scans; None where they are not to be shared, or there is one rank.

    Parameters
    ----------
    gather : the host's exchange

    Raises
    ------
    ValueError : scans are to be shared, and the host has no exchange.
    """
    if not shares_scans(settings, ranks):
        return None
    if gather is None:
        raise ValueError(
            "M3_PLUGIN_INDEX_SHARING=scan needs an exchange between the ranks of attention, which "
            "was not given; unset it"
        )
    return IndexSharing(
        rank=rank,
        ranks=ranks,
        num_index_heads=msa.num_index_heads,
        gather=gather,
        from_tokens=settings.index_sharing_from,
    )
