"""`norm_rope_store`: the caches of `cache_store`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m3_kernels.cache_store import CacheStore
from m3_kernels.launch import Launch
from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.norm_rope_store.parts import HeadNorms
from m3_kernels.norm_rope_store.triton import launches
from m3_kernels.paged import MSACaches
from m3_kernels.testing import production as m3
from m3_kernels.testing.compile_gate import Variant

ROTARY, ROWS = 64, 7


def variants(arch: int) -> Iterator[Variant]:
    """Its one kernel."""
    for name, caches in m3.caches(arch).items():
        yield Variant(name, launched(arch, caches), registers=96, shared=4 * 1024)


def launched(arch: int, caches: MSACaches) -> Launch:
    """The launch for bf16 activations and weights, and fp32 cosines and sines."""
    k, v = m3.heads(ROWS, m3.KV_HEADS), m3.heads(ROWS, m3.KV_HEADS)
    weight = m3.meta(m3.HEAD_DIM, dtype=torch.bfloat16)
    call = NormRopeStore(
        m3.heads(ROWS, m3.Q_HEADS),
        m3.heads(ROWS, m3.KV_HEADS),
        CacheStore(k, v, m3.heads(ROWS, 1).squeeze(1), caches, m3.slots(ROWS)),
        HeadNorms(weight, weight, weight, weight, eps=1e-6),
        m3.meta(ROWS, ROTARY, dtype=torch.float32),
        q_out=m3.meta(ROWS, m3.Q_HEADS, m3.HEAD_DIM, dtype=torch.bfloat16),
        index_q_out=m3.meta(ROWS, m3.KV_HEADS, m3.HEAD_DIM, dtype=torch.bfloat16),
    )
    (launch,) = launches(call, arch=arch)
    return launch
