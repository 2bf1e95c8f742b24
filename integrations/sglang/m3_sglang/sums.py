"""Sums over ranks of what a layer adds to the stream, each with the norm that reads it.

Attention and MLP hand on their rank's part. On GPUs from SM90 on SGLang has one launch for sum,
addition and norm of few rows, which its own M3 uses in decode and verification; the sum goes
through a buffer of its own, which is made once the weights are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.layernorm import GemmaRMSNorm
from torch import Tensor

from m3_sglang.compat import FusedSum, fused_sum, shared_rows, tensor_parallel_size

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import nn


class RankSums:
    """How the ranks of one model add up, decided when it is built.

    Parameters
    ----------
    hidden_size : of the model
    device_type : "cpu" or "cuda"
    """

    def __init__(self, *, hidden_size: int, device_type: str) -> None:
        self.hidden_size = hidden_size
        self.size = tensor_parallel_size()
        # groups of ranks that attend for requests of their own share all other layers
        self.shared = shared_rows()
        together = self.size > 1 and self.shared is None
        self.fused: FusedSum | None = fused_sum(device_type) if together else None

    def prepare(self) -> None:
        """Make the buffer of fused sums, on all ranks at once and before any graph is recorded.

        It is the process's: a draft model takes its target's.
        """
        if self.fused is not None:
            self.fused.register()

    def add_up(self, part: Tensor) -> Tensor:
        """[tokens, hidden] of this rank -> the same of all ranks that have these tokens."""
        if self.shared is not None:
            # an idle group has no tokens on any rank
            return self.shared.add_up(part) if len(part) else part
        return tensor_model_parallel_all_reduce(part) if self.size > 1 else part

    @property
    def are_whole(self) -> bool:
        """Whether `feed` gives sums over all ranks, and no parts."""
        return self.shared is not None

    def feed(self, layer: nn.Module, rows: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """What a layer that all ranks share makes of this rank's rows.

        Parameters
        ----------
        layer : [tokens, hidden] to this rank's part of the same
        rows : [tokens, hidden], the same on all ranks that have these tokens
        """
        if self.shared is None:
            return layer(rows)
        part = layer(self.shared.gather(rows, forward_batch))
        return self.shared.scatter(tensor_model_parallel_all_reduce(part), forward_batch)

    def normalise(
        self, norm: GemmaRMSNorm, part: Tensor, stream: Tensor, forward_batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Add all ranks' parts to the stream and normalise it: (normalised, stream).

        Parameters
        ----------
        part : [tokens, hidden], what this rank adds
        stream : [tokens, hidden], the same on every rank
        """
        fused = self.fused
        if fused is not None and self._fits(norm, part, stream, forward_batch, fused):
            # the weight is one less than what it multiplies with, which the kernel adds in fp32
            return fused.sum_and_norm(
                part,
                stream,
                norm.weight,
                norm.variance_epsilon,
                world_size=self.size,
                gemma=True,
                residual_out=torch.empty_like(stream),
            )
        return norm(self.add_up(part), stream)

    def _fits(
        self,
        norm: GemmaRMSNorm,
        part: Tensor,
        stream: Tensor,
        forward_batch: ForwardBatch,
        fused: FusedSum,
    ) -> bool:
        """Whether SGLang's own M3 would sum and normalise this step in one launch."""
        mode = forward_batch.forward_mode
        return (
            (mode.is_decode() or mode.is_target_verify())
            and all(x.dtype == torch.bfloat16 for x in (part, stream, norm.weight))
            and not forward_batch.can_run_tbo
            and fused.allowed()
            and fused.takes(len(part), self.hidden_size)
        )
