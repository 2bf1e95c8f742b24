"""Pixels as hosts send them to the engine, against transformers' normalised ones."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_plugin.model.pixels import PixelScale


def normalised(pixels: Tensor) -> Tensor:
    """What the vision tower makes of patches; they must come as bytes, uint8 [patches, values]."""
    assert pixels.dtype == torch.uint8
    scale = PixelScale.read({})
    assert scale is not None
    return scale.normalised(pixels)
