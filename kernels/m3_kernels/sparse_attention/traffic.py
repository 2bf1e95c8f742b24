"""Bytes and launches of `sparse_attention`'s Triton kernels, from a host description of the step.

No cache is counted: what several programs read counts for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m3_kernels.work_plan import DECODE_ROWS


@dataclass(frozen=True)
class AttentionTraffic:
    """What one layer moves in one step.

    Attributes
    ----------
    kv_bytes : keys and values read
    q_bytes, out_bytes : queries read, outputs written
    partial_bytes : partial results of segments, written; as much is read again
    launches : kernels started
    """

    kv_bytes: int
    q_bytes: int
    out_bytes: int
    partial_bytes: int
    launches: int


def sparse_attention_traffic(
    requests: Sequence[tuple[int, int]],
    *,
    chosen: Sequence[Sequence[Sequence[set[int]]]],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    q_bytes: int,
    kv_bytes: int,
    rows: int,
    segment_blocks: int,
    prefill_rows: int,
) -> AttentionTraffic:
    """Traffic of a step of (sequence length, query rows) requests.

    Parameters
    ----------
    chosen : visible blocks chosen, by request, KV head and row of the request
    q_bytes, kv_bytes : of one number of a query or output, of a key or value
    rows : rows of a program of the decode kernel (`DecodeTiles.rows`)
    segment_blocks : blocks of a segment (`DecodeTiles.segment_blocks`)
    prefill_rows : rows of a program of the prefill kernel; divides TILE_ROWS
    """
    keys = partials = 0
    for (seq_len, query_len), heads in zip(requests, chosen, strict=True):
        start = seq_len - query_len
        decoding = query_len <= DECODE_ROWS
        size = rows if decoding else prefill_rows
        # Tiles of the decode kernel begin at the request's first row, others at positions.
        shift = 0 if decoding else start % size
        for by_row in heads:
            for first in range(-shift, query_len, size):
                tile = range(max(first, 0), min(first + size, query_len))
                newest = start + tile[-1]
                segments = _segments([by_row[r] for r in tile], decoding, segment_blocks)
                for segment in segments:
                    keys += sum(_visible(block, newest, page_size) for block in segment)
                if decoding and len(segments) > 1:
                    partials += len(tile) * len(segments)
    group = num_q_heads // num_kv_heads
    queries = sum(query_len for _, query_len in requests) * num_q_heads * head_dim * q_bytes
    prefilling = max((query_len for _, query_len in requests), default=0) > DECODE_ROWS
    return AttentionTraffic(
        kv_bytes=keys * 2 * head_dim * kv_bytes,
        q_bytes=queries,
        out_bytes=queries,
        partial_bytes=partials * group * (head_dim + 2) * 4,
        launches=2 if prefilling else 1,
    )


def _segments(chosen: list[set[int]], decoding: bool, segment_blocks: int) -> list[set[int]]:
    """The unions that programs walk: all of a tile in prefill, rank by rank in decode."""
    if not decoding:
        return [set().union(*chosen)]
    ordered = [sorted(blocks) for blocks in chosen]
    return [
        set().union(*(blocks[at : at + segment_blocks] for blocks in ordered))
        for at in range(0, max(map(len, ordered)), segment_blocks)
    ]


def _visible(block: int, newest: int, page_size: int) -> int:
    """Keys of a block up to a position."""
    return min(page_size, newest - block * page_size + 1)
