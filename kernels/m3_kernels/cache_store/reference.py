"""The oracle of `cache_store`: one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def cache_store_reference(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scales: Tensor | None = None,
) -> None:
    """Write the pages; arguments as in the public function, already checked."""
    num_pages, page_size = index_k_pages.shape[:2]
    slots = slot_mapping.tolist()
    for slot in slots:
        if slot >= num_pages * page_size:
            raise IndexError(f"slot_mapping must stay below {num_pages * page_size}; got {slot}")
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        k_pages[page, :, offset] = stored(k[token], k_scale, k_pages.dtype)
        v_pages[page, :, offset] = stored(v[token], v_scale, v_pages.dtype)
        key = index_k[token]
        if index_k_scales is not None:
            scale = (key.float().abs().max() / 127).to(index_k_scales.dtype)
            index_k_scales[page, offset] = scale
            scale = torch.where(scale > 0, scale.float(), 1)
            key = (key.float() / scale).round().clamp(-127, 127)
        index_k_pages[page, offset] = stored(key, None, index_k_pages.dtype)


def stored(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values as the cache holds them; a scale is [1] or one number for each row of values."""
    if scale is not None:
        values = values.float() * (1 / scale)[:, None]
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = values.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)
