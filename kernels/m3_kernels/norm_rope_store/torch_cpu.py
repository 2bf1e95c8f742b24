"""Norm and RoPE in plain torch: any CPU, no compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m3_kernels.cache_store.torch_cpu import cache_store_torch
from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.norm_rope_store.parts import Part


def norm_and_rope_torch(parts: Sequence[Part], *, cos_sin: Tensor, eps: float) -> None:
    """Fill every part's `out` with its heads normalised and rotated."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.float()[:, None].chunk(2, dim=-1)
    for heads, weight, out in parts:
        wide = heads.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        wide = wide * (1 + weight.float())
        first, second, rest = wide.split([half, half, wide.shape[-1] - 2 * half], dim=-1)
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = second * cos + first * sin
        out[..., 2 * half :] = rest


def norm_rope_store_torch(call: NormRopeStore) -> None:
    """Fill the queries, and store what became of keys and index keys."""
    stored = call.stored
    keys, index_keys = call.rotated()
    norm_and_rope_torch(call.parts(keys, index_keys), cos_sin=call.cos_sin, eps=call.norms.eps)
    cache_store_torch(replace(stored, k=keys, index_k=index_keys))
