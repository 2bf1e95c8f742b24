"""One call of `dense_attention`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.paged import KVPages, Step, require_attention


@dataclass(frozen=True)
class DenseAttention:
    """All that an implementation of `dense_attention` gets; the public function explains it.

    Attributes
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension
    kv : pages [P, num_kv_heads, page_size, head_dim] of keys and of values, without scales
    step : the step's lengths and page table
    scale : factor of the dot products
    out : [T, num_q_heads, head_dim] of q's dtype, filled
    lse : fp32 [T, num_q_heads], filled unless None

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    q: Tensor
    kv: KVPages
    step: Step
    scale: float
    out: Tensor
    lse: Tensor | None = None

    def __post_init__(self) -> None:
        validation.require_float("k_pages", self.kv.k_pages)
        require_attention(self.q, self.kv, self.step, out=self.out, lse=self.lse)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.q.device

    @property
    def pages(self) -> tuple[KVPages, ...]:
        """What it reads of caches."""
        return (self.kv,)
