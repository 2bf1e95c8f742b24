"""Norms and RoPE of a dense layer's heads in one launch, as SGLang's own M3 has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3_sglang.compat import fused_norm_and_rope

# what SGLang's kernel is compiled for
_HEAD_DIM, _ROTARY_DIM = 128, 64


def norm_and_rotate(
    qkv: Tensor, positions: Tensor, *, norms: tuple[Any, Any], rope: Any, heads: tuple[int, int]
) -> bool:
    """Normalise and rotate the heads of q and k where they lie, in the one launch of SGLang's M3.

    Parameters
    ----------
    qkv : [tokens, q | k | v], changed in place
    norms : of the heads of q and of k
    rope : SGLang's, with a table of cosines and sines
    heads : how many of q and of k

    Returns
    -------
    bool : whether it was done; the kernel is CUDA's, and takes bf16 and the released heads
    """
    q_norm, k_norm = norms
    table = getattr(rope, "cos_sin_cache", None)
    if (
        table is None
        or table.dtype != torch.float32
        or table.shape[-1] != _ROTARY_DIM
        or q_norm.weight.numel() != _HEAD_DIM
        or qkv.dtype != torch.bfloat16
        or positions.dim() != 1
    ):
        return False
    kernel = fused_norm_and_rope()
    if kernel is None:
        return False
    q_heads, kv_heads = heads
    kernel(
        qkv,
        q_norm.weight,
        k_norm.weight,
        table,
        positions,
        q_heads,
        kv_heads,
        kv_heads,
        q_norm.variance_epsilon,
    )
    return True
