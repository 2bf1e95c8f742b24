"""Norms of the hidden stream on vLLM: one kernel each on a GPU, with the sum over ranks if it can.

`GemmaRMSNorm` computes 1 + w in fp32, and vLLM's own kernel takes no weight of another dtype than
its input: without torch.compile, which vLLM leaves out for this model's name, it is thirteen
launches.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_allreduce_gemma_rms_norm import (
    fused_allreduce_gemma_rms_norm,
)
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.utils.flashinfer import has_flashinfer


class HiddenNorm(GemmaRMSNorm):
    """Gemma RMSNorm by FlashInfer's kernels, which vLLM's own model of M3 calls too.

    With a residual both arguments are changed in place, as vLLM's fused norms do it.
    """

    def forward_cuda(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        kernels = _kernels()
        weight = self.weight
        if kernels is None or x.dtype != weight.dtype or x.dtype == torch.float32:
            return self.forward_native(x, residual)
        rows = x.reshape(-1, x.shape[-1])
        if residual is None:
            return kernels.gemma_rmsnorm(rows, weight, self.variance_epsilon).view(x.shape)
        kernels.gemma_fused_add_rmsnorm(rows, residual, weight, self.variance_epsilon)
        return rows, residual


def add_and_norm(x: Tensor, residual: Tensor, norm: Any, *, partial: bool) -> tuple[Tensor, Tensor]:
    """What a part of the model adds -> the next part's input, and the stream with it added.

    Parameters
    ----------
    x : [tokens, hidden], may be changed in place, as residual may
    partial : whether x is this rank's part of a sum over the tensor parallel group
    """
    if partial:
        return fused_allreduce_gemma_rms_norm(x, residual, norm)
    return norm(x, residual)


@cache
def _kernels() -> Any:
    """FlashInfer's norms, which vLLM's GPU wheels require; None without them."""
    if not has_flashinfer():
        return None
    return importlib.import_module("flashinfer.norm")
