"""What norm and RoPE are applied to: heads by kind, weights of their norms, where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from m3_kernels import validation


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


@dataclass(frozen=True)
class HeadNorms:
    """Norms of the heads of one sparse layer: Gemma RMSNorm, one weight for all heads of a kind.

    Attributes
    ----------
    q, k : [head_dim], w of a factor 1 + w
    index_q, index_k : [index_dim]
    eps : added to the mean of squares
    """

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    eps: float

    def require_sizes(self, head_dim: int, index_dim: int, device: torch.device) -> None:
        """Raise TypeError or ValueError unless the weights fit heads of these sizes."""
        for name, weight, size, words in (
            ("q_weight", self.q, head_dim, "[head_dim]"),
            ("k_weight", self.k, head_dim, "[head_dim]"),
            ("index_q_weight", self.index_q, index_dim, "[index_dim]"),
            ("index_k_weight", self.index_k, index_dim, "[index_dim]"),
        ):
            validation.require_shape(name, weight, (size,), words)
            validation.require_float(name, weight)
            validation.require_dense_rows(name, weight)
            validation.require_device(name, weight, device)
