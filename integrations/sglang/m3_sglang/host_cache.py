"""HiCache on a CPU: the two functions that SGLang's package has for accelerators alone.

SGLang keeps evicted pages of K, V and index keys in a second pool, and copies them back when a
prefix comes again; its pools for MiniMax-M3 hold the index keys beside K and V. On a CPU both pools
lie in main memory, so nothing is gained but the test of what a GPU server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3_plugin.host.presence import PluginRefusal

_COPY = "transfer_kv_direct"


def copy_rows(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copy cache slots from one pool's layers to another's; SGLang's own asks for whole pages.

    Parameters
    ----------
    src_layers, dst_layers : [slots, heads, channels] each, K and V of a layer one after the other
    src_indices, dst_indices : integer [rows]
    """
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices.long()] = source[src_indices.long()]


def allocate(
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    pin_memory: bool,
    allocator: Any,
    registration_granularity_bytes: int | None = None,
) -> Tensor:
    """Memory of the second pool, which no driver has to know; arguments are SGLang's."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def prepare_host_cache(*, device_type: str) -> None:
    """On a CPU, put the functions above where SGLang has none; once per process.

    Raises
    ------
    PluginRefusal : SGLang has one of its own by now, or keeps them elsewhere.
    """
    if device_type != "cpu":
        return
    from sglang.srt.mem_cache.pool_host import mha
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    if getattr(mha, _COPY, copy_rows) is not copy_rows:
        raise PluginRefusal(f"SGLang has a {_COPY} of its own on this CPU; it was never run")
    setattr(mha, _COPY, copy_rows)
    ALLOC_MEMORY_FUNCS["cpu"] = allocate
