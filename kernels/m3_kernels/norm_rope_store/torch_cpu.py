"""Norm and RoPE in plain torch: any CPU, no compiler."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_and_rope_torch(
    x: Tensor, weight: Tensor, *, cos_sin: Tensor, positions: Tensor, eps: float
) -> Tensor:
    """Heads [T, heads, dim] normalised and turned, in x's dtype."""
    count, rotary_dim = cos_sin.shape
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < count:
        raise IndexError(
            f"positions must be in 0..{count - 1}; got {int(positions.min())} to "
            f"{int(positions.max())}"
        )
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())
    cos, sin = cos_sin[positions].float()[:, None].chunk(2, dim=-1)
    first, second, rest = wide.split(
        [rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1
    )
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)
