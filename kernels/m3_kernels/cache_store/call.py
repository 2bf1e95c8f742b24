"""One call of `cache_store`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.paged import IndexPages, KVPages, MSACaches


@dataclass(frozen=True)
class CacheStore:
    """All that an implementation of `cache_store` gets; the public function says what it means.

    Attributes
    ----------
    k, v : [T, num_kv_heads, head_dim], any strides with a contiguous last dimension
    index_k : [T, index_dim], any strides with a contiguous last dimension
    caches : the layer's pages and their scales, written in place
    slot_mapping : int64 [T], `page * page_size + offset`; a negative slot stores nothing

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    k: Tensor
    v: Tensor
    index_k: Tensor
    caches: MSACaches
    slot_mapping: Tensor

    def __post_init__(self) -> None:
        device = self.device
        caches, words = self.caches, "[T, num_kv_heads, head_dim]"
        validation.require_shape("k", self.k, (None, None, None), words)
        rows, heads, dim = self.k.shape
        pool = "[P, num_kv_heads, page_size, head_dim]"
        validation.require_shape("k_pages", caches.k_pages, (None, heads, None, dim), pool)
        validation.require_shape("v", self.v, (rows, heads, dim), words)
        words = "[T, index_dim]"
        validation.require_shape("index_k", self.index_k, (rows, caches.index_dim), words)
        for name, tensor in (("k", self.k), ("v", self.v), ("index_k", self.index_k)):
            validation.require_float(name, tensor)
            validation.require_dense_rows(name, tensor)
            validation.require_device(name, tensor, device)
        validation.require_dtype("slot_mapping", self.slot_mapping, torch.int64)
        validation.require_shape("slot_mapping", self.slot_mapping, (rows,), "[T]")
        validation.require_dense_rows("slot_mapping", self.slot_mapping)
        validation.require_device("slot_mapping", self.slot_mapping, device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.caches.kv.device

    @property
    def pages(self) -> tuple[KVPages | IndexPages, ...]:
        """What it writes of caches."""
        return self.caches.kv, self.caches.index
