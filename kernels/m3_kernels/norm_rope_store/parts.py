"""What norm and RoPE are applied to: heads of one kind, by what, and where results go."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Heads of one kind.

    Attributes
    ----------
    heads : [T, heads, dim]
    weight : [dim], w of a factor 1 + w
    out : as heads; written in place
    """

    heads: Tensor
    weight: Tensor
    out: Tensor
