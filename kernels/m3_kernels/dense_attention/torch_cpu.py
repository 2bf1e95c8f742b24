"""`dense_attention` in plain torch: any CPU, no compiler, bounded workspace.

Requests one after another; of each a chunk of rows against the keys up to its last row, in one
product per part of the keys. Like every BLAS product its last bits depend on the shape of the call;
the C++ implementation's do not.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

# Numbers of one tile of logits, fp32; and pages that are gathered at a time.
LOGITS = 4 * 2**20
GATHERED_PAGES = 16


def dense_attention_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill `out` and `lse`; arguments as in the public function, already checked."""
    page_size = k_pages.shape[2]
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    chunk = max(1, LOGITS // (q.shape[1] * GATHERED_PAGES * page_size))
    bounds = pairwise(cu_seqlens_q.tolist())
    for (first, last), seq_len, pages in zip(bounds, seq_lens.tolist(), page_table, strict=True):
        first = max(first, last - seq_len)
        for start in range(first, last, chunk):
            rows = slice(start, min(start + chunk, last))
            position = seq_len - last + torch.arange(rows.start, rows.stop)
            attended, log_sum = _attend(
                q[rows], k_pages, v_pages, pages, position=position, scale=scale
            )
            out[rows] = attended.to(out.dtype)
            if lse is not None:
                lse[rows] = log_sum


def _attend(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, *, position: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs fp32 [rows, q heads, dim] and lse [rows, q heads] of consecutive rows of a request.

    Parameters
    ----------
    pages : int32 [max_pages], of the request
    position : int64 [rows], rising
    """
    rows, q_heads, dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    visible_pages = pages[: int(position[-1]) // page_size + 1].long()
    if rows > 1 and not _finite_where_hidden(v_pages, visible_pages, position):
        alone = [
            _attend(
                q[row : row + 1],
                k_pages,
                v_pages,
                pages,
                position=position[row : row + 1],
                scale=scale,
            )
            for row in range(rows)
        ]
        return torch.cat([out for out, _ in alone]), torch.cat([log_sum for _, log_sum in alone])
    # heads of a group are rows of one product
    q = q.float().mul(scale).view(rows, kv_heads, -1, dim).permute(1, 2, 0, 3)
    log_sum = torch.full(q.shape[:-1], -math.inf)
    attended = torch.zeros(q.shape)
    for first, some in zip(
        range(0, len(visible_pages), GATHERED_PAGES),
        visible_pages.split(GATHERED_PAGES),
        strict=True,
    ):
        keys, values = (
            cache[some].transpose(0, 1).flatten(1, 2).float() for cache in (k_pages, v_pages)
        )
        key_position = first * page_size + torch.arange(keys.shape[1])
        values[:, key_position > position[-1]] = 0
        logits = (q.flatten(1, 2) @ keys.transpose(1, 2)).view(*q.shape[:-1], -1)
        logits.masked_fill_(key_position > position[:, None], -math.inf)
        merged = torch.logaddexp(log_sum, logits.logsumexp(-1))
        base = merged.masked_fill(merged == -math.inf, 0)[..., None]
        weights = logits.sub_(base).exp_()
        attended *= (log_sum[..., None] - base).exp_()
        attended += (weights.flatten(1, 2) @ values).view_as(attended)
        log_sum = merged
    return (
        attended.permute(2, 0, 1, 3).reshape(rows, q_heads, dim),
        log_sum.permute(2, 0, 1).reshape(rows, q_heads),
    )


def _finite_where_hidden(v_pages: Tensor, visible_pages: Tensor, position: Tensor) -> bool:
    """Whether values that only some of the rows see are finite: no weight of zero silences others.

    Parameters
    ----------
    visible_pages : int64, pages up to the last row's own
    position : int64 [rows], rising
    """
    page_size = v_pages.shape[2]
    first = int(position[0]) + 1
    values = v_pages[visible_pages[first // page_size :]].transpose(1, 2).flatten(0, 1)
    start = first // page_size * page_size
    return bool(values[first - start : int(position[-1]) + 1 - start].isfinite().all())
