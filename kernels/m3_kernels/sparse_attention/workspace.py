"""Memory which `sparse_attention` needs besides its arguments on a GPU, and its tiles.

The tiles are a pure function of the layer's geometry and the chip. What decides a row's bits (keys
per step, blocks per segment) never depends on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3_kernels.tiles import MIN_TILE, dot_dtype, keys_per_step, power_of_two
from m3_kernels.tuning import arch_of, kernel_config
from m3_kernels.work_plan import DECODE_ROWS


@dataclass(frozen=True)
class DecodeTiles:
    """How the decode kernel cuts a step.

    Attributes
    ----------
    rows : query rows of a program
    row_groups : programs that share the rows of a request
    group_pad : query heads of a KV head, padded
    lines : pairs of row and query head in a program's products, with those that fill them up
    key_axis : of the logits, along which keys lie: 0 where lines are few, else 1
    head_pad : head dimension, padded
    keys : keys of one step of online softmax
    segment_blocks : chosen blocks of a row in one partial softmax
    segments : partial softmaxes of a row, at most
    """

    rows: int
    row_groups: int
    group_pad: int
    lines: int
    key_axis: int
    head_pad: int
    keys: int
    segment_blocks: int
    segments: int

    @property
    def columns(self) -> int:
        """Pairs of row and query head that a program can have."""
        return self.rows * self.group_pad

    @property
    def partial_size(self) -> int:
        """fp32 numbers that one segment leaves in the workspace."""
        return self.columns * (self.head_pad + 2)


def decode_tiles(
    *,
    max_query_len: int,
    group: int,
    head_dim: int,
    page_size: int,
    topk: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    arch: int,
    decode_rows: int = DECODE_ROWS,
) -> DecodeTiles:
    """Tiles of the decode kernel.

    Parameters
    ----------
    max_query_len : capped at decode_rows
    group : query heads of a KV head
    dtype, kv_dtype : of q and of the pages
    arch : compute capability as major * 10 + minor
    decode_rows : query rows of a request of decode kind, as in the step's `WorkPlan`
    """
    query_len = min(max(max_query_len, 1), decode_rows)
    config = attention_config(
        "sparse_attention_decode",
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_query_len=query_len,
        arch=arch,
    )
    rows = min(power_of_two(query_len), config["MAX_ROWS"])
    segment_blocks = min(config["SEGMENT_BLOCKS"], topk)
    group_pad = max(power_of_two(group), MIN_TILE)
    return DecodeTiles(
        rows=rows,
        row_groups=-(-query_len // rows),
        group_pad=group_pad,
        lines=max(rows * group_pad, config["MIN_LINES"]),
        key_axis=1 if config["MIN_LINES"] else 0,
        head_pad=max(power_of_two(head_dim), MIN_TILE),
        keys=keys_per_step(page_size, config["MAX_KEYS"]),
        segment_blocks=segment_blocks,
        segments=-(-topk // segment_blocks),
    )


def attention_config(
    kernel: str, *, dtype: torch.dtype, kv_dtype: torch.dtype, max_query_len: int, arch: int
) -> dict[str, Any]:
    """Meta-parameters of a kernel of this op.

    Its configurations may ask for dot, kv and rows: query rows of a request, 1 to DECODE_ROWS. What
    decides a row's bits (MAX_KEYS, SEGMENT_BLOCKS) must not differ between numbers of rows.
    """
    return kernel_config(
        kernel,
        arch=arch,
        dot=str(dot_dtype(dtype, kv_dtype)).removeprefix("torch."),
        kv=str(kv_dtype).removeprefix("torch."),
        rows=min(max(max_query_len, 1), DECODE_ROWS),
    )


@dataclass(frozen=True)
class SparseAttentionWorkspace:
    """Partial results of the decode kernel, shared by all layers of a step, never by two streams.

    Attributes
    ----------
    partial : fp32 [any], contents arbitrary
    arrivals : int32 [any], zeros before and after every call
    """

    partial: Tensor
    arrivals: Tensor


def allocate_sparse_attention_workspace(
    *,
    max_reqs: int,
    max_query_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    topk: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    decode_rows: int = DECODE_ROWS,
    arch: int | None = None,
) -> SparseAttentionWorkspace:
    """A workspace that suffices for every step of at most `max_reqs` requests.

    Parameters
    ----------
    max_query_len : query rows of a request; more than decode_rows ask for no more memory
    dtype, kv_dtype : of q and of the pages
    decode_rows : query rows of a request of decode kind, as in the step's `WorkPlan`
    arch : the chip whose tiles are used, major * 10 + minor; None for the device's own
    """
    tiles = decode_tiles(
        max_query_len=max_query_len,
        group=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        topk=topk,
        dtype=dtype,
        kv_dtype=kv_dtype,
        arch=arch_of(device) if arch is None else arch,
        decode_rows=decode_rows,
    )
    units = max_reqs * tiles.row_groups * num_kv_heads
    partial = units * tiles.segments * tiles.partial_size
    return SparseAttentionWorkspace(
        partial=torch.empty(partial, dtype=torch.float32, device=device),
        arrivals=torch.zeros(units, dtype=torch.int32, device=device),
    )
