"""`cache_store`: what is written, what is left alone, and casting."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from m3_kernels.cache_store import cache_store
from m3_kernels.capability import Backend
from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.testing.cases import (
    DTYPES,
    Case,
    all_cases,
    build,
    empty_caches,
    empty_pages,
    whole_storage,
)

EVERY_BACKEND: tuple[Backend, ...] = ("native", "torch", "reference")


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_writes_its_tokens_and_nothing_else(case: Case, backend: Backend) -> None:
    inputs = build(case)
    pages = empty_pages(case, inputs.k_pages.shape[0])
    cache_store(
        inputs.k,
        inputs.v,
        inputs.index_k,
        *pages,
        slot_mapping=inputs.slot_mapping,
        backend=backend,
    )
    expected = empty_pages(case, inputs.k_pages.shape[0])
    for token, slot in enumerate(inputs.slot_mapping.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, case.page_size)
            expected[0][page, :, offset] = inputs.k[token]
            expected[1][page, :, offset] = inputs.v[token]
            expected[2][page, offset] = inputs.index_k[token]
    for got, want in zip(pages, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_casts_to_the_cache(source: torch.dtype, target: torch.dtype, backend: Backend) -> None:
    inputs = build(Case("cast", ((3, 20),)).with_dtype(source))
    pages = empty_pages(inputs.case.with_dtype(target), inputs.k_pages.shape[0])
    cache_store(
        inputs.k,
        inputs.v,
        inputs.index_k,
        *pages,
        slot_mapping=inputs.slot_mapping,
        backend=backend,
    )
    page, offset = divmod(int(inputs.slot_mapping[19]), inputs.case.page_size)
    assert torch.equal(pages[0][page, :, offset], inputs.k[19].to(target))
    assert torch.equal(pages[1][page, :, offset], inputs.v[19].to(target))
    assert torch.equal(pages[2][page, offset], inputs.index_k[19].to(target))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_slot_outside_the_pool_is_refused_before_anything_is_written(backend: Backend) -> None:
    inputs = build(Case("outside", ((3, 20),)))
    pages = empty_pages(inputs.case, inputs.k_pages.shape[0])
    inputs.slot_mapping[-1] = inputs.k_pages.shape[0] * inputs.case.page_size
    with pytest.raises(IndexError, match="slot_mapping"):
        cache_store(
            inputs.k,
            inputs.v,
            inputs.index_k,
            *pages,
            slot_mapping=inputs.slot_mapping,
            backend=backend,
        )
    assert all(page.isnan().all() for page in pages)


@pytest.mark.parametrize("dtype", [torch.int8, PLANES_DTYPE])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_index_keys_with_scales_are_the_references_bytes(
    case: Case, backend: Backend, dtype: torch.dtype
) -> None:
    case = dataclasses.replace(case, index_dtype=dtype)
    inputs = build(case)
    if len(inputs.index_k) > 2:
        inputs.index_k[0] = 0
        inputs.index_k[1] = torch.arange(case.index_dim) - 16.5  # halves of a step: ties
        inputs.index_k[1, 0] = 127
    stored = []
    for name in (backend, "reference"):
        *pages, scales, low = empty_caches(case, inputs.k_pages.shape[0])
        assert scales is not None
        cache_store(
            inputs.k,
            inputs.v,
            inputs.index_k,
            *pages,
            slot_mapping=inputs.slot_mapping,
            index_k_scales=scales,
            index_k_low=low,
            backend=name,
        )
        # keys and scales live in one memory, as a host holds them
        stored.append(whole_storage(pages[2]).clone())
    assert stored[0].dtype == torch.int8
    assert torch.equal(*stored)
