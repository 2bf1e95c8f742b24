"""`cache_store` in plain torch: any CPU, no compiler."""

from __future__ import annotations

import torch
from torch import Tensor


def cache_store_torch(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    *,
    slot_mapping: Tensor,
    index_k_scales: Tensor | None,
) -> None:
    """Write the pages; arguments as in the public function, already checked."""
    tokens = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[tokens]
    num_slots = index_k_pages.shape[0] * index_k_pages.shape[1]
    if slots.numel() and int(slots.max()) >= num_slots:
        raise IndexError(f"slot_mapping must stay below {num_slots}; got {int(slots.max())}")
    page = slots // index_k_pages.shape[1]
    offset = slots % index_k_pages.shape[1]
    k_pages[page, :, offset] = k[tokens].to(k_pages.dtype)
    v_pages[page, :, offset] = v[tokens].to(v_pages.dtype)
    index_keys = index_k[tokens]
    if index_k_scales is not None:
        index_keys, index_k_scales[page, offset] = in_int8(index_keys, index_k_scales.dtype)
    index_k_pages[page, offset] = index_keys.to(index_k_pages.dtype)


def in_int8(index_k: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [T, index_dim] as int8 and the scale of each, [T], as `cache_store` defines them."""
    keys = index_k.float()
    scales = (keys.abs().amax(dim=1) / 127).to(scale_dtype)
    divisors = torch.where(scales > 0, scales.float(), 1)
    return (keys / divisors[:, None]).round().clamp(-127, 127).to(torch.int8), scales
