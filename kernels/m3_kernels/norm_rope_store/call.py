"""One call of `norm_rope_store`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.cache_store import CacheStore
from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.norm_rope_store.parts import HeadNorms, Part
from m3_kernels.paged import IndexPages, KVPages


@dataclass(frozen=True)
class NormRopeStore:
    """All that an implementation of `norm_rope_store` gets; the public function says what it means.

    Attributes
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension
    index_q : [T, num_index_heads, index_dim], likewise
    stored : the rows that are normalised and rotated and then stored, and where: k, v, index_k,
        their caches and their slots
    norms : of the four kinds of heads
    cos_sin : floating [T, rotary_dim], cosines and then sines of each row's angles
    q_out, index_q_out : as q and index_q, filled

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    q: Tensor
    index_q: Tensor
    stored: CacheStore
    norms: HeadNorms
    cos_sin: Tensor
    q_out: Tensor
    index_q_out: Tensor

    def __post_init__(self) -> None:
        device = self.device
        rows, _, head_dim = self.stored.k.shape
        index_dim = self.stored.caches.index_dim
        words = "[T, num_q_heads, head_dim]"
        validation.require_shape("q", self.q, (rows, None, head_dim), words)
        words = "[T, num_index_heads, index_dim]"
        validation.require_shape("index_q", self.index_q, (rows, None, index_dim), words)
        for name, out, source in (
            ("q", self.q_out, self.q),
            ("index_q", self.index_q_out, self.index_q),
        ):
            validation.require_dtype(f"{name}_out", out, source.dtype)
            validation.require_shape(f"{name}_out", out, tuple(source.shape), f"as {name}")
            if source.numel() and out.data_ptr() == source.data_ptr() and not out.is_meta:
                raise ValueError(f"{name}_out must not be {name} itself")
        self.norms.require_sizes(head_dim, index_dim, device)
        validation.require_shape("cos_sin", self.cos_sin, (rows, None), "[T, rotary_dim]")
        rotary_dim = self.cos_sin.shape[1]
        if rotary_dim % 2 or rotary_dim > min(head_dim, index_dim):
            raise ValueError(
                f"cos_sin must have an even number of columns, at most head_dim {head_dim} and "
                f"index_dim {index_dim}; got {rotary_dim}"
            )
        for name in ("q", "index_q", "q_out", "index_q_out", "cos_sin"):
            tensor = getattr(self, name)
            validation.require_float(name, tensor)
            validation.require_dense_rows(name, tensor)
            validation.require_device(name, tensor, device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.stored.device

    @property
    def pages(self) -> tuple[KVPages | IndexPages, ...]:
        """What it writes of caches."""
        return self.stored.pages

    def rotated(self) -> tuple[Tensor, Tensor]:
        """Memory for k and index_k between norm and store, in the dtypes they are rounded to."""
        k, index_k = self.stored.k, self.stored.index_k
        planes = self.stored.caches.index.dtype == PLANES_DTYPE
        dtype = torch.float32 if planes else index_k.dtype
        return torch.empty_like(k), torch.empty_like(index_k, dtype=dtype)

    def parts(self, keys: Tensor, index_keys: Tensor) -> tuple[Part, Part, Part, Part]:
        """The heads that are rotated; those that are stored go to `keys` and `index_keys`."""
        norms, stored = self.norms, self.stored
        return (
            Part(self.q, norms.q, self.q_out),
            Part(stored.k, norms.k, keys),
            Part(self.index_q, norms.index_q, self.index_q_out),
            Part(stored.index_k[:, None], norms.index_k, index_keys[:, None]),
        )
