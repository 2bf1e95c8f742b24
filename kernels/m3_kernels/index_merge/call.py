"""One call of `index_merge`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.paged import IndexPages, KVPages


@dataclass(frozen=True)
class IndexMerge:
    """All that an implementation of `index_merge` gets; the public function says what it means.

    Attributes
    ----------
    ids : int32 [ranks, num_index_heads, T, topk], any strides with a contiguous last dimension
    scores : fp32, as `ids`
    cu_seqlens_q : int32 [R + 1]
    seq_lens : int32 [R]
    page_size : tokens of a block
    num_local_blocks, num_init_blocks : newest and first blocks that are always chosen
    out : int32 [num_index_heads, T, topk], filled

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device, layout or count is not in the contract
    """

    ids: Tensor
    scores: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    page_size: int
    num_local_blocks: int
    num_init_blocks: int
    out: Tensor

    def __post_init__(self) -> None:
        words = "[ranks, num_index_heads, T, topk]"
        validation.require_shape("ids", self.ids, (None,) * 4, words)
        validation.require_shape("scores", self.scores, tuple(self.ids.shape), words)
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1; got {self.page_size}")
        for name in ("num_local_blocks", "num_init_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        validation.require_shape("seq_lens", self.seq_lens, (None,), "[R]")
        starts = (self.seq_lens.shape[0] + 1,)
        validation.require_shape("cu_seqlens_q", self.cu_seqlens_q, starts, "[R + 1]")
        words = "[num_index_heads, T, topk]"
        validation.require_shape("out", self.out, tuple(self.ids.shape[1:]), words)
        for name in ("ids", "scores", "cu_seqlens_q", "seq_lens", "out"):
            tensor = getattr(self, name)
            dtype = torch.float32 if name == "scores" else torch.int32
            validation.require_dtype(name, tensor, dtype)
            validation.require_dense_rows(name, tensor)
            validation.require_device(name, tensor, self.device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.ids.device

    @property
    def pages(self) -> tuple[KVPages | IndexPages, ...]:
        """It reads no caches."""
        return ()
