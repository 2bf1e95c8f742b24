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


def norm_and_rotate(
    qkv: Tensor, positions: Tensor, *, norms: tuple[Any, Any], rope: Any, heads: tuple[int, int]
) -> bool:
    """Normalise and rotate the heads of q and k where they lie, in the one launch of vLLM's M3.

    Parameters
    ----------
    qkv : [tokens, q | k | v], changed in place
    norms : of the heads of q and of k
    rope : vLLM's, with a table of cosines and sines
    heads : how many of q and of k

    Returns
    -------
    bool : whether it was done; vLLM builds the kernel for CUDA alone, and it takes 16 bits
    """
    if torch.compiler.is_compiling() or qkv.dtype.itemsize != 2:
        return False
    kernel = _norm_and_rope()
    if kernel is None:
        return False
    q_norm, k_norm = norms
    kernel(
        qkv,
        q_norm.weight,
        k_norm.weight,
        rope.cos_sin_cache,
        positions,
        *heads,
        rope.rotary_dim,
        q_norm.variance_epsilon,
        kv_cache_dtype="auto",
    )
    return True


@cache
def _norm_and_rope() -> Any:
    """vLLM's kernel; None where it was not built."""
    if not hasattr(torch.ops._C, "fused_minimax_m3_qknorm_rope_kv_insert"):
        return None
    return importlib.import_module("vllm._custom_ops").fused_minimax_m3_qknorm_rope_kv_insert


@cache
def _kernels() -> Any:
    """FlashInfer's norms, which vLLM's GPU wheels require; None without them."""
    if not has_flashinfer():
        return None
    return importlib.import_module("flashinfer.norm")
