"""The oracle of `cache_store`: one token at a time."""

from __future__ import annotations

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
        k_pages[page, :, offset] = k[token].to(k_pages.dtype)
        v_pages[page, :, offset] = v[token].to(v_pages.dtype)
        index_k_pages[page, offset] = index_k[token].to(index_k_pages.dtype)
