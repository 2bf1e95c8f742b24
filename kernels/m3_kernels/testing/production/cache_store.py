"""`cache_store`: a cache of bf16, and the smallest one that the chip serves."""

from __future__ import annotations

from collections.abc import Iterator

from m3_kernels.cache_store.call import CacheStore
from m3_kernels.cache_store.triton import launches
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import Variant


def variants(arch: int) -> Iterator[Variant]:
    """Its one kernel."""
    for name, caches in m3.caches(arch).items():
        k, v = m3.heads(7, m3.KV_HEADS), m3.heads(7, m3.KV_HEADS)
        index_k = m3.heads(7, 1).squeeze(1)
        (launch,) = launches(CacheStore(k, v, index_k, caches, m3.slots(7)), arch=arch)
        # numbers of 8 bits are rounded by hand; six programs of four warps still fit on an SM
        registers = 80 if caches.k_pages.element_size() == 1 else 64
        yield Variant(name, launch, registers=registers, shared=1024)
