"""`cache_store` in plain torch: any CPU, no compiler."""

from __future__ import annotations

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
    index_k_pages[page, offset] = index_k[tokens].to(index_k_pages.dtype)
