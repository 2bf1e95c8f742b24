"""Partial RoPE: SGLang's own where it has kernels for the device, computed angles on CPUs."""

from __future__ import annotations

from typing import Any

from torch import nn

from m3_plugin.model.config import M3Config
from m3_plugin.model.rope import ComputedRope


def make_rope(config: M3Config, *, device_type: str) -> nn.Module:
    """RoPE of dense layers, called as `rope(positions, query, key)`."""
    if device_type == "cpu":
        # SGLang's class imports a kernel of another engine there
        return ComputedRope.of(config)
    from sglang.srt.layers.rotary_embedding import get_rope

    arguments: dict[str, Any] = {
        "rotary_dim": config.rotary_dim,
        "max_position": config.max_position_embeddings,
        "base": config.rope_theta,
        "rope_scaling": None,
    }
    return get_rope(config.head_dim, **arguments)
