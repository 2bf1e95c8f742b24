"""Norm and RoPE in plain torch: any CPU, no compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3_kernels.norm_rope_store.parts import Part


def norm_and_rope_torch(parts: Sequence[Part], *, cos_sin: Tensor, eps: float) -> None:
    """Fill every part's `out` with its heads normalised and turned."""
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
