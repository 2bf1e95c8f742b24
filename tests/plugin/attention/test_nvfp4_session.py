"""A session that rounds to NVFP4 stores what the published description says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m3_kernels.cache_store import cache_store
from m3_kernels.paged import MSACaches
from m3_plugin.attention.backends import choose_kernels
from m3_plugin.attention.session import MSASession
from tests.plugin.attention.test_session import (
    DIM,
    HEADS,
    KV_HEADS,
    NORMS,
    PAGE,
    angles,
    inputs,
    msa,
    step,
)

LENGTH = 300
LADDER = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def published(values: Tensor) -> Tensor:
    """K, V and index keys as the model was trained with them, by searching the ladder."""
    groups = values.float().unflatten(-1, (-1, 16))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    scale = (largest / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    ratio = groups / scale
    size = ratio.abs().clamp(max=6).contiguous()
    below = torch.searchsorted(LADDER, size)
    above = torch.searchsorted(LADDER, size, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (E2M1[code] * ratio.sign() * scale).flatten(-2)


def pool(dtype: torch.dtype, index_dtype: torch.dtype) -> MSACaches:
    """Packed K | V pages as vLLM allocates them."""
    num_pages = -(-LENGTH // PAGE)
    packed = torch.zeros(num_pages, KV_HEADS, PAGE, 2 * DIM, dtype=dtype)
    index = torch.zeros(num_pages, PAGE, DIM, dtype=index_dtype)
    int8 = index_dtype == torch.int8
    scales = torch.zeros(num_pages, PAGE, dtype=torch.float16) if int8 else None
    k_pages, v_pages = packed.split(DIM, dim=-1)
    return MSACaches(k_pages, v_pages, index, index_k_scales=scales)


def run(family: Any, caches: MSACaches, *, nvfp4: bool, chunks: tuple[int, ...]) -> Tensor:
    kernels = choose_kernels("cpu", family)
    session = MSASession(msa(), kernels=kernels, scale=DIM**-0.5, nvfp4=nvfp4)
    pages = torch.arange(caches.k_pages.shape[0], dtype=torch.int32)
    tensors, out, start = inputs(LENGTH), torch.empty(LENGTH, HEADS, DIM), 0
    for size in chunks:
        rows = slice(start, start + size)
        session.run(
            session.plan(step(start + size, size, pages)),
            *(tensor[rows] for tensor in tensors),
            norms=NORMS,
            cos_sin=angles(start, start + size),
            caches=caches,
            out=out[rows],
        )
        start += size
    return out


def store(family: Any, caches: MSACaches, *, nvfp4: bool) -> None:
    """The first part of `run` alone, of the whole sequence at once."""
    kernels = choose_kernels("cpu", family)
    session = MSASession(msa(), kernels=kernels, scale=DIM**-0.5, nvfp4=nvfp4)
    pages = torch.arange(caches.k_pages.shape[0], dtype=torch.int32)
    plan = session.plan(step(LENGTH, LENGTH, pages))
    session.store(plan, *inputs(LENGTH), norms=NORMS, cos_sin=angles(0, LENGTH), caches=caches)


def contents(caches: MSACaches) -> tuple[Tensor, ...]:
    """Keys, values and index keys of the sequence, as they are stored."""
    k, v = (
        pages.transpose(1, 2).flatten(0, 1)[:LENGTH] for pages in (caches.k_pages, caches.v_pages)
    )
    return k, v, caches.index_k_pages.flatten(0, 1)[:LENGTH]


@pytest.mark.parametrize("family", ["native", "torch"])
@pytest.mark.parametrize(
    ("dtype", "index_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
    ],
)
def test_what_is_stored(family: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    plain = pool(torch.float32, torch.float32)
    store(family, plain, nvfp4=False)
    k, v, index_k = contents(plain)
    wanted = pool(dtype, index_dtype)
    cache_store(
        published(k),
        published(v),
        published(index_k).to(torch.float8_e4m3fn).float(),
        wanted.k_pages,
        wanted.v_pages,
        wanted.index_k_pages,
        slot_mapping=torch.arange(LENGTH),
        index_k_scales=wanted.index_k_scales,
        backend="reference",
    )
    found = pool(dtype, index_dtype)
    store(family, found, nvfp4=True)
    for ours, theirs in zip(contents(found), contents(wanted), strict=True):
        assert torch.equal(ours, theirs)
    if wanted.index_k_scales is not None:
        assert found.index_k_scales is not None
        assert torch.equal(found.index_k_scales, wanted.index_k_scales)


def test_chunks_change_no_bit() -> None:
    """Nor does a row know which rows came with it."""
    outs, stored = [], []
    for chunks in ((LENGTH,), (1, 128, 171), (299, 1)):
        caches = pool(torch.bfloat16, torch.bfloat16)
        outs.append(run("native", caches, nvfp4=True, chunks=chunks))
        stored.append(caches)
    for out, caches in zip(outs[1:], stored[1:], strict=True):
        assert torch.equal(out, outs[0])
        for ours, first in zip(contents(caches), contents(stored[0]), strict=True):
            assert torch.equal(ours, first)


def test_it_is_off_unless_asked_for() -> None:
    caches = pool(torch.float32, torch.float32)
    rounded = run("native", caches, nvfp4=True, chunks=(LENGTH,))
    exact = run("native", pool(torch.float32, torch.float32), nvfp4=False, chunks=(LENGTH,))
    assert 1e-3 < (rounded - exact).abs().mean() < 0.2
    session = MSASession(msa(), kernels=choose_kernels("cpu"), scale=1.0)
    assert not session.nvfp4


def test_a_row_without_a_place_is_stored_nowhere() -> None:
    """As padding rows of a captured step have none."""
    caches = pool(torch.float32, torch.float32)
    session = MSASession(msa(), kernels=choose_kernels("cpu"), scale=1.0, nvfp4=True)
    batch = step(2, 2, torch.arange(1, dtype=torch.int32))
    batch.slot_mapping[1] = -1
    session.run(
        session.plan(batch),
        *(tensor[:2] for tensor in inputs(LENGTH)),
        norms=NORMS,
        cos_sin=angles(0, 2),
        caches=caches,
        out=torch.empty(2, HEADS, DIM),
    )
    assert caches.k_pages[0, :, 0].any()
    assert not caches.k_pages[0, :, 1:].any()
