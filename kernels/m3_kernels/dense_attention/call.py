"""One call of `dense_attention`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.paged import KVPages, Step


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
        device = self.device
        words = "[T, num_q_heads, head_dim]"
        validation.require_float("q", self.q)
        validation.require_shape("q", self.q, (None, None, None), words)
        rows, q_heads, dim = self.q.shape
        k_pages, pool = self.kv.k_pages, "[P, num_kv_heads, page_size, head_dim]"
        validation.require_float("k_pages", k_pages)
        validation.require_shape("k_pages", k_pages, (None, None, None, dim), pool)
        kv_heads = k_pages.shape[1]
        if kv_heads == 0 or q_heads % kv_heads != 0:
            raise ValueError(
                f"q must have a multiple of the {kv_heads} KV heads; got {q_heads} heads"
            )
        validation.require_dense_rows("q", self.q)
        validation.require_device("k_pages", k_pages, device)
        self.step.require_device(device)
        validation.require_dtype("out", self.out, self.q.dtype)
        validation.require_shape("out", self.out, (rows, q_heads, dim), words)
        validation.require_dense_rows("out", self.out)
        validation.require_device("out", self.out, device)
        if self.lse is not None:
            validation.require_dtype("lse", self.lse, torch.float32)
            validation.require_shape("lse", self.lse, (rows, q_heads), "[T, num_q_heads]")
            validation.require_device("lse", self.lse, device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.q.device

    @property
    def pages(self) -> tuple[KVPages, ...]:
        """What it reads of caches."""
        return (self.kv,)
