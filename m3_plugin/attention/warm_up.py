"""Every kernel that a step can need, launched before the first request asks for it.

Triton compiles a kernel when it is first launched. Nothing a host does before it serves is a step
of many rows per request with plan and pages, so its first prompt would wait for a compiler.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from m3_kernels.index_topk.workspace import CHOICE_BLOCKS
from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import Workspace

logger = logging.getLogger(__name__)


def warm_up(session: MSASession, caches: MSACaches) -> int:
    """Run each kind of step once on a layer's pages, of which nothing is changed.

    Layers whose pages lie alike need it once; the session remembers. Without a workspace nothing is
    compiled, and nothing is done.

    Parameters
    ----------
    caches : the pages that will be served

    Returns
    -------
    Steps run.
    """
    workspace = session.workspace
    if workspace is None or caches.k_pages.shape[0] == 0:
        return 0
    kind = _layout(caches)
    if kind in session.warmed:
        return 0
    session.warmed.add(kind)
    capacity, steps = workspace.capacity, 0
    shorter = {min(capacity.max_seq_len, blocks * workspace.page_size) for blocks in CHOICE_BLOCKS}
    with torch.inference_mode():
        for rows in range(1, min(capacity.decode_rows + 1, capacity.max_rows) + 1):
            for max_seq_len in shorter | {capacity.max_seq_len}:
                if max_seq_len >= rows:
                    _run(session, workspace, caches, rows=rows, max_seq_len=max_seq_len)
                    steps += 1
    logger.info("m3-plugin: MSA kernels were run on the served pages, in %d steps", steps)
    return steps


def _run(
    session: MSASession, workspace: Workspace, caches: MSACaches, *, rows: int, max_seq_len: int
) -> None:
    """One request of so many rows, whose keys are not stored; its pages are read and not used."""
    shape, device = workspace.shape, caches.k_pages.device

    def numbers(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    batch = MSABatch(
        cu_seqlens_q=numbers(0, rows),
        seq_lens=numbers(rows),
        page_table=numbers(0)[None],
        slot_mapping=numbers(*[-1] * rows, dtype=torch.int64),
        max_query_len=rows,
        max_seq_len=max_seq_len,
    )
    # as hosts hand them on: parts of one projection
    heads, kv_heads, dim = shape.num_q_heads, shape.num_kv_heads, shape.head_dim
    index_dim = session.msa.index_dim
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim, kv_heads * index_dim, index_dim]
    fused = torch.zeros(rows, sum(sizes), dtype=shape.dtype, device=device)
    q, k, v, index_q, index_k = fused.split(sizes, dim=-1)
    weight, index_weight = (
        torch.zeros(size, dtype=shape.dtype, device=device) for size in (dim, index_dim)
    )
    session.run(
        session.plan(batch),
        q.unflatten(-1, (heads, dim)),
        k.unflatten(-1, (kv_heads, dim)),
        v.unflatten(-1, (kv_heads, dim)),
        index_q.unflatten(-1, (kv_heads, index_dim)),
        index_k,
        norms=HeadNorms(weight, weight, index_weight, index_weight, eps=1e-6),
        cos_sin=torch.zeros(rows, shape.rotary_dim, dtype=torch.float32, device=device),
        caches=caches,
        out=torch.empty(rows, heads, dim, dtype=shape.dtype, device=device),
    )


def _layout(caches: MSACaches) -> tuple[object, ...]:
    """What kernels are compiled for: strides and dtypes, and which scales there are."""
    return tuple(
        None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16) for t in caches.tensors
    )
