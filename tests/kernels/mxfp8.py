"""Inputs of `mxfp8_linear`: every code and scale, odd sizes, strided activations, empty groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearCase:
    """Sizes of one product.

    Attributes
    ----------
    groups : tokens of each group; None for one matrix without groups
    before, after : tokens of no group
    """

    name: str
    tokens: int
    rows: int
    columns: int
    groups: tuple[int, ...] | None = None
    before: int = 0
    after: int = 0


CASES = (
    LinearCase("one-token", 1, 70, 96),
    LinearCase("no-token", 0, 32, 32),
    LinearCase("tokens-of-two-tiles", 40, 33, 160),
    LinearCase("rows-of-two-tiles", 3, 150, 64),
    LinearCase("groups", 41, 40, 64, groups=(3, 0, 20, 0, 17, 1)),
    LinearCase("tokens-of-no-group", 9, 24, 96, groups=(0, 2, 3), before=1, after=3),
    LinearCase("no-group-has-a-token", 2, 24, 32, groups=(0, 0), after=2),
)


def inputs(case: LinearCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x (a view with NaN beside it), weight, scales, group_starts."""
    random = torch.Generator().manual_seed(case.tokens + case.rows)
    around = torch.full((case.tokens, case.columns + 8), torch.nan, dtype=dtype)
    x = around[:, : case.columns]
    x.copy_(torch.randn(case.tokens, case.columns, generator=random))
    lead = () if case.groups is None else (len(case.groups),)
    weight = torch.randn(*lead, case.rows, case.columns, generator=random).to(torch.float8_e4m3fn)
    blocks = (*lead, case.rows, case.columns // 32)
    scales = torch.randint(120, 130, blocks, generator=random).to(torch.uint8)
    if case.groups is None:
        return x, weight, scales, None
    starts = torch.tensor([0, *case.groups]).cumsum(0).int() + case.before
    assert starts[-1] + case.after == case.tokens
    return x, weight, scales, starts


def every_code() -> tuple[Tensor, Tensor, Tensor]:
    """An identity, and a weight with every finite e4m3 value times every power that keeps it so.

    Codes that are no number are replaced by 0, and scales end before 448 times them overflows.
    """
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    scales = torch.arange(247, dtype=torch.uint8)
    weight = codes.repeat(len(scales), 1).view(torch.float8_e4m3fn)
    return torch.eye(256), weight, scales[:, None].repeat(1, 8)
