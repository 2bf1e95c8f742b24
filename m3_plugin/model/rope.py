"""Partial RoPE of the text model: frequencies, and the angles of a step's rows.

Angles are fp32(position) * fp32(frequency), as in training. They are formed once per step and
shared by its MSA layers, rather than kept as a table: no memory that grows with the context, no
position past a table's end, and fp32 whatever the dtype of activations.
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
