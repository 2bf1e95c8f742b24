"""Random weights of every kind of `StoredMatrix`, with all codes that are numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3_kernels.stored_matrix import FOUR_BITS, GROUP_OF_KIND, KINDS, Kind, StoredMatrix

# Kind, and what differs within it: the dtype of plain codes or of int4 scales, zero points, group.
VARIANTS: tuple[tuple[Kind, dict[str, Any]], ...] = (
    *((kind, {}) for kind in KINDS),
    ("plain", {"dtype": torch.float32}),
    ("plain", {"dtype": torch.float16}),
    ("fp8", {"group": 4096}),
    ("int4", {"dtype": torch.bfloat16, "group": 32}),
    ("int4", {"dtype": torch.float32, "has_zeros": False}),
)


def random_matrix(
    kind: Kind,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    group: int = 128,
    has_zeros: bool = True,
    seed: int = 0,
) -> StoredMatrix:
    """[..., rows, columns] of values around 1."""
    random = torch.Generator().manual_seed(seed)
    *lead, columns = shape
    if kind == "plain":
        return StoredMatrix(kind, torch.randn(shape, generator=random).to(dtype or torch.bfloat16))
    group = GROUP_OF_KIND.get(kind, group)
    groups = (*lead, -(-columns // group))
    zeros = factors = None
    if kind in FOUR_BITS:
        codes = _bytes((*lead, columns // 2), random)
    else:
        codes = _bytes(shape, random)
        codes[(codes & 0x7F) == 0x7F] = 0
    if kind in ("mxfp8", "mxfp4"):
        scales = torch.randint(115, 125, groups, generator=random).to(torch.uint8)
    elif kind == "nvfp4":
        scales = torch.rand(groups, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)
        factors = torch.rand(lead, generator=random)
    else:
        # as fine as bf16 holds it, for 448 is the largest code of 8 bits
        scales = torch.rand(groups, generator=random) / 16
        if kind == "int4":
            scales = scales.to(dtype or torch.float16)
            zeros = torch.randint(16, groups, generator=random).to(torch.uint8)
    return StoredMatrix(kind, codes, scales, group, zeros if has_zeros else None, factors)


def _bytes(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randint(256, shape, generator=random).to(torch.uint8)
