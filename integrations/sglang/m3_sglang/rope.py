"""Partial RoPE: SGLang's own where it has kernels for the device, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3_plugin.model.config import M3Config
from m3_plugin.model.rope import RowAngles


class PlainRotaryEmbedding(nn.Module):
    """NeoX RoPE on the first `rotary_dim` channels, in fp32.

    SGLang's class imports a kernel of another engine on a plain CPU.
    """

    def __init__(self, *, head_dim: int, rotary_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.angles = RowAngles(rotary_dim=rotary_dim, theta=theta)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key: [tokens, heads * head_dim] each, returned in the same shape."""
        cos, sin = self.angles(positions)[:, None].chunk(2, dim=-1)
        return self._turn(query, cos, sin), self._turn(key, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, self.head_dim))
        rotated = heads[..., : self.rotary_dim].float()
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((rotated.to(x.dtype), heads[..., self.rotary_dim :]), dim=-1).flatten(1)


def make_rope(config: M3Config, *, device_type: str) -> nn.Module:
    """RoPE of dense layers, called as `rope(positions, query, key)`."""
    if device_type == "cpu":
        return PlainRotaryEmbedding(
            head_dim=config.head_dim, rotary_dim=config.rotary_dim, theta=config.rope_theta
        )
    from sglang.srt.layers.rotary_embedding import get_rope

    arguments: dict[str, Any] = {
        "rotary_dim": config.rotary_dim,
        "max_position": config.max_position_embeddings,
        "base": config.rope_theta,
        "rope_scaling": None,
    }
    return get_rope(config.head_dim, **arguments)
