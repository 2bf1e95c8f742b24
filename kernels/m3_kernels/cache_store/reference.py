"""The oracle of `cache_store`: one token at a time."""

from __future__ import annotations

import math

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
        if caches.index_k_low is not None:
            assert index_scales is not None
            high, low, scale = in_two_planes(key.float().tolist())
            caches.index_k_pages[page, offset] = torch.tensor(high, dtype=torch.int8)
            caches.index_k_low[page, offset] = torch.tensor(low, dtype=torch.int8)
            index_scales[page, offset] = scale
            continue
        if index_scales is not None:
            scale = (key.float().abs().max() / 127).to(index_scales.dtype)
            index_scales[page, offset] = scale
            scale = torch.where(scale > 0, scale.float(), 1)
            key = (key.float() / scale).round().clamp(-127, 127)
        caches.index_k_pages[page, offset] = stored(key, None, caches.index_k_pages.dtype)


def in_two_planes(key: list[float]) -> tuple[list[int], list[int], Tensor]:
    """High and low bytes of a key of fp32 numbers, and its scale."""
    scale = (torch.tensor(key).abs().max() / 127).bfloat16()
    if not math.isfinite(sum(abs(number) for number in key)):
        return [0] * len(key), [0] * len(key), torch.tensor(math.nan)
    high, low = [], []
    for number in key:
        quotient = torch.tensor(number) / scale.float() if scale > 0 else torch.zeros(())
        code = max(-32639, min(32639, round(256 * float(quotient))))
        high.append((code + 128) // 256)
        low.append(code - 256 * high[-1])
    return high, low, scale


def stored(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values as the cache holds them; a scale is [1] or one number for each row of values."""
    if scale is not None:
        values = values.float() * (1 / scale)[:, None]
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = values.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)
