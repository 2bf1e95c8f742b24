"""Bytes and launches of `index_topk`'s Triton kernels, and what sharing a scan saves.

From a host description of the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from m3_kernels.work_plan import DECODE_ROWS


@dataclass(frozen=True)
class IndexTraffic:
    """What one layer moves; bytes of device memory, caches between programs not counted.

    Attributes
    ----------
    key_bytes : index keys and their scales read by requests of decode kind, every one once
    score_bytes : fp32 scores of those requests, written once and read once
    prefill_key_bytes : index keys read by the tiles of prefill rows, most of it from the L2 cache
    launches : kernels started
    """

    key_bytes: int
    score_bytes: int
    prefill_key_bytes: int
    launches: int


def index_topk_traffic(
    requests: Sequence[tuple[int, int]],
    *,
    num_index_heads: int,
    index_dim: int,
    page_size: int,
    topk: int,
    key_bytes: int,
    scale_bytes: int = 0,
    tile_rows: int = 32,
    pass_rows: int | None = None,
) -> IndexTraffic:
    """Traffic of a step of (sequence length, query rows) requests.

    Parameters
    ----------
    key_bytes : of one number of a key
    scale_bytes : of one token's scale
    tile_rows : query rows whose heads share a tile of prefill
    pass_rows : rows which the workspace holds the scores of; None for all
    """
    token = index_dim * key_bytes + scale_bytes
    blocks = prefill_blocks = scored = read = 0
    rows = sum(query_len for _, query_len in requests)
    first_row = 0
    for seq_len, query_len in requests:
        if 1 <= query_len <= DECODE_ROWS:
            seen = -(-seq_len // page_size)
            blocks += seen
            scored += seen * query_len
            own = [(seq_len - query_len + row) // page_size + 1 for row in range(query_len)]
            read += sum(count for count in own if count > topk)
        elif query_len > DECODE_ROWS:
            bounds = _tile_ends(first_row, query_len, rows, tile_rows, pass_rows or max(rows, 1))
            for end in bounds:
                visible = seq_len - query_len + (end - first_row)
                prefill_blocks += -(-max(visible, 0) // page_size)
        first_row += query_len
    passes = 0
    if max((query_len for _, query_len in requests), default=0) > DECODE_ROWS:
        passes = -(-rows // (pass_rows or rows))
    return IndexTraffic(
        key_bytes=blocks * page_size * token,
        score_bytes=4 * num_index_heads * (scored + read),
        prefill_key_bytes=prefill_blocks * page_size * token,
        launches=2 + 2 * passes if rows and requests else 0,
    )


def _tile_ends(
    first_row: int, query_len: int, rows: int, tile_rows: int, pass_rows: int
) -> list[int]:
    """The rows after the last one of this request in each tile that holds some of its rows."""
    ends = []
    row = first_row
    while row < first_row + query_len:
        start = row // pass_rows * pass_rows
        tile_end = row + tile_rows - (row - start) % tile_rows
        row = min(tile_end, start + pass_rows, first_row + query_len, rows)
        ends.append(row)
    return ends


@dataclass(frozen=True)
class SharedScan:
    """What changes for a rank in one layer of a step whose scan ranks share, in bytes.

    Attributes
    ----------
    saved : index keys that other ranks read in its place
    received : candidates of other ranks, by the layer's one all-gather
    projected : weights of other ranks' index heads, whose queries it needs as well
    """

    saved: int
    received: int
    projected: int


def shared_scan_traffic(
    tokens: int,
    *,
    rows: int,
    ranks: int,
    num_index_heads: int,
    index_dim: int,
    hidden_size: int,
    topk: int,
    token_bytes: int,
    weight_bytes: int = 2,
) -> SharedScan:
    """Traffic of a step of decoding that sees so many tokens, those of all requests together.

    Parameters
    ----------
    rows : query rows, of which each sends its candidates
    token_bytes : that a scan reads of an index key and its scale
    weight_bytes : of one number of a projection
    """
    other_heads = num_index_heads - max(1, num_index_heads // ranks)
    return SharedScan(
        saved=tokens * token_bytes * (ranks - 1) // ranks,
        received=8 * topk * num_index_heads * rows * (ranks - 1),
        projected=other_heads * index_dim * hidden_size * weight_bytes,
    )


def break_even_tokens(
    *,
    ranks: int,
    num_index_heads: int,
    index_dim: int,
    hidden_size: int,
    token_bytes: int,
    bytes_per_second: float,
    exchange_seconds: float,
    weight_bytes: int = 2,
) -> int:
    """Tokens of a step from which a shared scan is faster: a model, of bytes and one exchange.

    Parameters
    ----------
    bytes_per_second : of a rank's memory
    exchange_seconds : that an all-gather of a few KB takes
    others : as of `shared_scan_traffic`
    """
    cost = shared_scan_traffic(
        0,
        rows=0,
        ranks=ranks,
        num_index_heads=num_index_heads,
        index_dim=index_dim,
        hidden_size=hidden_size,
        topk=0,
        token_bytes=token_bytes,
        weight_bytes=weight_bytes,
    )
    spent = exchange_seconds * bytes_per_second + cost.projected
    return math.ceil(spent * ranks / (token_bytes * (ranks - 1)))
