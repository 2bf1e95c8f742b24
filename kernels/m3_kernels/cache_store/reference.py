"""The oracle of `cache_store`: one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.cache_store.call import CacheStore


def cache_store_reference(call: CacheStore) -> None:
    """Write the pages."""
    caches, index_scales = call.caches, call.caches.index_k_scales
    num_pages, page_size = caches.index_k_pages.shape[:2]
    slots = call.slot_mapping.tolist()
    for slot in slots:
        if slot >= num_pages * page_size:
            raise IndexError(f"slot_mapping must stay below {num_pages * page_size}; got {slot}")
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        dtype = caches.k_pages.dtype
        caches.k_pages[page, :, offset] = stored(call.k[token], caches.k_scale, dtype)
        caches.v_pages[page, :, offset] = stored(call.v[token], caches.v_scale, dtype)
        key = call.index_k[token]
        if index_scales is not None:
            scale = (key.float().abs().max() / 127).to(index_scales.dtype)
            index_scales[page, offset] = scale
            scale = torch.where(scale > 0, scale.float(), 1)
            key = (key.float() / scale).round().clamp(-127, 127)
        caches.index_k_pages[page, offset] = stored(key, None, caches.index_k_pages.dtype)


def stored(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values as the cache holds them; a scale is [1] or one number for each row of values."""
    if scale is not None:
        values = values.float() * (1 / scale)[:, None]
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = values.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)
