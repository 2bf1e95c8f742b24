"""`cache_store` as one Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from m3_kernels.cache_store.call import CacheStore
from m3_kernels.cache_store.triton_write import (
    load_heads,
    put_heads,
    put_index_key,
    require_writable,
    row_arguments,
)
from m3_kernels.launch import Launch
from m3_kernels.triton_shared import await_previous_launch, dependent_launch
from m3_kernels.tuning import arch_of, kernel_config


@triton.jit
def cache_store_kernel(
    k,
    v,
    index_k,
    index_stride_row,
    keys,
    values,
    index_keys,
    slot_mapping,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_INDEX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token): a negative slot stores nothing.

    `k` and `v` are `Heads`; `keys` and `values` are a `Pool`, `index_keys` an `IndexPool`.
    """
    await_previous_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot_mapping + row)
    if place < 0:
        return
    page = place // PAGE_SIZE
    slot = place % PAGE_SIZE
    head = tl.arange(0, HEADS_PAD)
    dim = tl.arange(0, HEAD_PAD)
    key = load_heads(k, row, head, KV_HEADS, HEAD_DIM, dim)
    value = load_heads(v, row, head, KV_HEADS, HEAD_DIM, dim)
    put_heads(key, keys, page, slot, head, dim, KV_HEADS, HEAD_DIM, LARGEST)
    put_heads(value, values, page, slot, head, dim, KV_HEADS, HEAD_DIM, LARGEST)
    lane = tl.arange(0, INDEX_PAD)
    index_key = tl.load(index_k + row * index_stride_row + lane, mask=lane < INDEX_DIM, other=0.0)
    put_index_key(index_key, index_keys, page, slot, lane, INDEX_DIM, LARGEST_INDEX)


def cache_store_triton(call: CacheStore) -> None:
    """Write the pages.

    Raises
    ------
    NotImplementedError : the chip has no cast to the dtype of the pages
    """
    for launch in launches(call, arch=arch_of(call.device)):
        launch()


def launches(call: CacheStore, *, arch: int) -> Iterator[Launch]:
    """What is launched for a call, with the configuration of a chip (major * 10 + minor).

    Raises
    ------
    NotImplementedError : the chip has no cast to the dtype of the pages
    """
    require_writable("cache_store", call.caches, arch)
    rows = call.k.shape[0]
    if rows == 0:
        return
    arguments = {
        **row_arguments(call),
        # An ordinary launch: what runs before it is the host's. The next may begin early.
        "PDL": dependent_launch(call.device, arch)["PDL"],
        **kernel_config("cache_store", arch=arch),
    }
    yield Launch(cache_store_kernel, (rows,), arguments)
