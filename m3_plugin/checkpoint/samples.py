"""A few numbers of each weight, by which one state of a model is told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLES = 256


def sample(weight: Tensor) -> Tensor:
    """Bits of some of a weight's numbers: uint8 [n], at places that its size alone decides.

    At random places: packed layouts leave those at regular distances where they were.
    """
    flat = weight.detach().reshape(-1)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(max(1, flat.numel()), (SAMPLES,), generator=generator)
    found = flat[places.to(flat.device)] if flat.numel() else flat
    return found.cpu().contiguous().view(torch.uint8)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that are others for a model of other names, shapes or numbers.

    Samples suffice for weights that were trained on: of thousands of numbers some have changed.
    """
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        found.update(sample(weight).numpy().tobytes())
    return found.hexdigest()[:16]
