"""`cache_store` in plain torch: any CPU, no compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.cache_store.call import CacheStore

# Of 16-bit fixed point whose high byte is at most 127 and whose low byte reaches from -128 to 127.
LARGEST_CODE = 127 * 256 + 127


def cache_store_torch(call: CacheStore) -> None:
    """Write the pages."""
    caches = call.caches
    tokens = (call.slot_mapping >= 0).nonzero().squeeze(1)
    slots = call.slot_mapping[tokens]
    num_pages, page_size = caches.index_k_pages.shape[:2]
    if slots.numel() and int(slots.max()) >= num_pages * page_size:
        raise IndexError(
            f"slot_mapping must stay below {num_pages * page_size}; got {int(slots.max())}"
        )
    page, offset = slots // page_size, slots % page_size
    caches.k_pages[page, :, offset] = call.k[tokens].to(caches.k_pages.dtype)
    caches.v_pages[page, :, offset] = call.v[tokens].to(caches.v_pages.dtype)
    index_keys, scales = call.index_k[tokens], caches.index_k_scales
    if caches.index_k_low is not None:
        assert scales is not None
        index_keys, low, scales[page, offset] = in_planes(index_keys, scales.dtype)
        caches.index_k_low[page, offset] = low
    elif scales is not None:
        index_keys, scales[page, offset] = in_int8(index_keys, scales.dtype)
    caches.index_k_pages[page, offset] = index_keys.to(caches.index_k_pages.dtype)


def in_int8(index_k: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [T, index_dim] as int8 and the scale of each, [T], as `cache_store` defines them."""
    keys = index_k.float()
    scales = (keys.abs().amax(dim=1) / 127).to(scale_dtype)
    divisors = torch.where(scales > 0, scales.float(), 1)
    return (keys / divisors[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def in_planes(index_k: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [T, index_dim] as high and low bytes and the scale of each, as `cache_store` defines.

    Returns
    -------
    high, low : int8 [T, index_dim]; scales : `scale_dtype` [T]
    """
    keys = index_k.float()
    largest = keys.abs().amax(dim=1)
    scales = (largest / 127).to(scale_dtype)
    divisors = torch.where(scales > 0, scales.float(), torch.inf)
    # so divided, a key of scale zero is zero; what is not finite stays so and is cleared below
    codes = (keys / divisors[:, None] * 256).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    finite = largest.isfinite()
    codes = torch.where(finite[:, None], codes, 0).int()
    high = (codes + 128) >> 8
    scales = torch.where(finite, scales, torch.nan)
    return high.to(torch.int8), (codes - 256 * high).to(torch.int8), scales
