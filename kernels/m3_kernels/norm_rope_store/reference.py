"""The oracle of norm and RoPE: one token, one head and one pair of channels at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_and_rope_reference(
    x: Tensor, weight: Tensor, *, cos_sin: Tensor, positions: Tensor, eps: float
) -> Tensor:
    """Heads [T, heads, dim] normalised and turned, in x's dtype."""
    out = torch.empty_like(x)
    half = cos_sin.shape[1] // 2
    for token, position in enumerate(positions.tolist()):
        if not 0 <= position < cos_sin.shape[0]:
            raise IndexError(f"positions must be in 0..{cos_sin.shape[0] - 1}; got {position}")
        angles = cos_sin[position].float()
        for head in range(x.shape[1]):
            values = x[token, head].float()
            values = values / (values.square().mean() + eps).sqrt() * (1 + weight.float())
            turned = values.clone()
            for c in range(half):
                cos, sin = angles[c], angles[half + c]
                turned[c] = values[c] * cos - values[half + c] * sin
                turned[half + c] = values[half + c] * cos + values[c] * sin
            out[token, head] = turned
    return out
