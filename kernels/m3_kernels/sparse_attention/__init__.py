"""The op `sparse_attention`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.sparse_attention.call import PrefillAttention, SparseAttention
from m3_kernels.sparse_attention.flashinfer import (
    flashinfer_prefill,
    flashinfer_refusal,
    pages_refusal,
)
from m3_kernels.sparse_attention.interface import SPARSE_ATTENTION, sparse_attention
from m3_kernels.sparse_attention.workspace import (
    SparseAttentionWorkspace,
    allocate_sparse_attention_workspace,
)

__all__ = [
    "SPARSE_ATTENTION",
    "PrefillAttention",
    "SparseAttention",
    "SparseAttentionWorkspace",
    "allocate_sparse_attention_workspace",
    "flashinfer_prefill",
    "flashinfer_refusal",
    "pages_refusal",
    "sparse_attention",
]
