"""Partial RoPE of the text model: frequencies, and the angles of a step's rows.

Angles are fp32(position) * fp32(frequency), as in training. They are formed once per step and
shared by its MSA layers, rather than kept as a table: no memory that grows with the context, no
position past a table's end, and fp32 whatever the dtype of activations. Dense layers do so on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3_plugin.model.config import M3Config


class RowAngles(nn.Module):
    """Cosines and sines by which the heads of each row are rotated.

    Lives on the device under which it is made, beside the parameters of the model, but holds none.
    """

    frequencies: Tensor

    def __init__(self, *, rotary_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
        # computed on the CPU, so that every device has the same
        frequencies = (1.0 / theta**exponents).to(torch.get_default_device())
        self.register_buffer("frequencies", frequencies, persistent=False)

    @classmethod
    def of(cls, config: M3Config) -> RowAngles:
        """Those of a model's text part."""
        return cls(rotary_dim=config.rotary_dim, theta=config.rope_theta)

    def forward(self, positions: Tensor) -> Tensor:
        """Integer positions [T] -> fp32 [T, rotary_dim]: cosines, then sines."""
        angles = positions.float()[:, None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class ComputedRope(nn.Module):
    """NeoX RoPE on the first `rotary_dim` channels of each head, in fp32 and without a table.

    For dense layers on CPUs, where hosts would make a table of the longest context at every start:
    134 MB and seconds for a million positions.
    """

    def __init__(self, *, head_dim: int, rotary_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.angles = RowAngles(rotary_dim=rotary_dim, theta=theta)

    @classmethod
    def of(cls, config: M3Config) -> ComputedRope:
        """That of a model's text part."""
        return cls(head_dim=config.head_dim, rotary_dim=config.rotary_dim, theta=config.rope_theta)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key: [tokens, heads * head_dim] each, returned in the same shape."""
        cos, sin = self.angles(positions)[:, None].chunk(2, dim=-1)
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, self.head_dim))
        rotated = heads[..., : self.rotary_dim].float()
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((rotated.to(x.dtype), heads[..., self.rotary_dim :]), dim=-1).flatten(1)
