"""What the score kernels of decode and prefill share."""

from __future__ import annotations

import triton
import triton.language as tl

# Page ids are loaded this many at a time and taken out of registers one by one: an address that
# waits for a load within the loop keeps Triton from pipelining the keys. One id for each lane of a
# warp makes taking one out a matter of shuffles.
PAGES = tl.constexpr(32)


@triton.jit
def load_keys(
    key_pages,
    key_tiles,
    page,
    offset,
    stride_page,
    stride_slot,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Index keys [KEYS, DIM_PAD] of a page from slot `offset` on; zeros past its edges."""
    if USE_DESCRIPTORS:
        keys = tl.reshape(key_tiles.load([page, offset, 0]), [KEYS, DIM_PAD])
    else:
        slot = offset + tl.arange(0, KEYS)
        dim = tl.arange(0, DIM_PAD)
        start = key_pages + page.to(tl.int64) * stride_page
        places = start + (slot.to(tl.int64) * stride_slot)[:, None] + dim[None, :]
        if PAGE_SIZE % KEYS == 0 and DIM == DIM_PAD:
            keys = tl.load(places)
        else:
            inside = (slot < PAGE_SIZE)[:, None] & (dim < DIM)[None, :]
            keys = tl.load(places, mask=inside, other=0.0)
    return keys


@triton.jit
def load_scales(key_scales, page, offset, stride_page, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """One scale for each key, fp32 [KEYS]."""
    slot = offset + tl.arange(0, KEYS)
    place = key_scales + page.to(tl.int64) * stride_page + slot
    return tl.load(place, mask=slot < PAGE_SIZE, other=0.0).to(tl.float32)
