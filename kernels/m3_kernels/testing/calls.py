"""Calls of the ops on the inputs of a case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3_kernels.index_topk import INDEX_TOPK, IndexTopk
from m3_kernels.paged import IndexPages, KVPages, Step
from m3_kernels.sparse_attention import SparseAttention
from m3_kernels.testing.cases import Inputs


def index_call(inputs: Inputs, *, keys: IndexPages | None = None, **changes: Any) -> IndexTopk:
    """The choice of blocks of a case, into a buffer of garbage."""
    heads, topk = inputs.index_q.shape[1], inputs.case.topk
    given = {
        "out": torch.full((heads, inputs.index_q.shape[0], topk), 123456789, dtype=torch.int32),
        "step": Step(**inputs.batch),
        **inputs.selection,
    }
    if keys is None:
        keys = IndexPages(inputs.index_k_pages, inputs.index_k_scales, inputs.index_k_low)
    return IndexTopk(inputs.index_q, keys=keys, **(given | changes))


def chosen(inputs: Inputs) -> Tensor:
    """The ids that the oracle chooses, int32 [num_kv_heads, T, topk]."""
    call = index_call(inputs)
    INDEX_TOPK.run(call, backend="reference")
    return call.out


def attention_call(inputs: Inputs, block_ids: Tensor, **changes: Any) -> SparseAttention:
    """The attention of a case over chosen blocks, into rows of NaN that lie apart."""
    rows, heads, dim = inputs.q.shape
    given = {
        "kv": KVPages(inputs.k_pages, inputs.v_pages, inputs.k_scale, inputs.v_scale),
        "scale": inputs.scale,
        "out": torch.full((rows, heads + 1, dim), torch.nan, dtype=inputs.q.dtype)[:, :heads],
        "lse": torch.full((heads, rows), torch.nan).T,
        "step": Step(**inputs.batch),
    }
    return SparseAttention(inputs.q, block_ids=block_ids, **(given | changes))
