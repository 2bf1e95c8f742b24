"""The Triton kernel of `cache_store`: against the reference, in every dtype a cache can have."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from m3_kernels.cache_store import cache_store
from m3_kernels.testing.cases import Case, Inputs, all_cases, build, empty_pages
from tests.kernels.test_addressing import FAR_PAGE, far_heads, far_pool

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# A program per token: the long prefills say nothing more.
CASES = [case for case in all_cases() if case.num_rows < 40]


def store(inputs: Inputs, pages: tuple[Tensor, ...], backend: str, **scales: Tensor) -> None:
    cache_store(
        inputs.k,
        inputs.v,
        inputs.index_k,
        *pages,
        slot_mapping=inputs.slot_mapping,
        backend=backend,  # pyright: ignore[reportArgumentType]
        **scales,
    )


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_writes_its_tokens_and_nothing_else(case: Case) -> None:
    inputs = build(case)
    got, want = (empty_pages(case, inputs.k_pages.shape[0]) for _ in range(2))
    store(inputs, got, "triton")
    store(inputs, want, "reference")
    assert_same(got, want)
    assert any(page.isfinite().any() for page in got) == bool((inputs.slot_mapping >= 0).any())


def test_addresses_beyond_32_bits() -> None:
    case = Case("far", ((60, 3),), num_kv_heads=4, head_dim=64, index_dim=136, dtype=torch.float16)
    inputs = build(case)
    wanted = empty_pages(case, inputs.k_pages.shape[0])
    store(inputs, wanted, "reference")
    far = tuple(far_pool(pages) for pages in empty_pages(case, inputs.k_pages.shape[0]))
    slots = inputs.slot_mapping + FAR_PAGE * case.page_size
    store(dataclasses.replace(inputs, slot_mapping=slots), far, "triton")
    assert_same(tuple(pages[FAR_PAGE:] for pages in far), wanted)
    k_pages, v_pages, index_pages = empty_pages(case, inputs.k_pages.shape[0])
    apart = (far_heads(k_pages), far_heads(v_pages), index_pages)
    store(inputs, apart, "triton")
    assert_same(apart, wanted)


@pytest.mark.parametrize("source", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target", FP8, ids=str)
@pytest.mark.parametrize("scales", ["none", "one", "each head"])
def test_fp8_pages(source: torch.dtype, target: torch.dtype, scales: str) -> None:
    """Of numbers that fp8 holds exactly: the interpreter rounds others in a way of its own."""
    inputs = build(Case("fp8", ((3, 6),)).with_dtype(source))
    for tensor in (inputs.k, inputs.v, inputs.index_k):
        tensor.copy_((tensor * 2).round().clamp(-4, 4) / 2)
    inputs.k[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 65504, -65504])
    count = {"none": 0, "one": 1, "each head": 2}[scales]
    factors = {
        name: torch.tensor([0.25, 2.0])[:count]
        for name in ("k_scale", "v_scale")
        if scales != "none"
    }
    pages = empty_pages(inputs.case, inputs.k_pages.shape[0])
    got, want = (tuple(page.to(target) for page in pages) for _ in range(2))
    store(inputs, got, "triton", **factors)
    store(inputs, want, "reference", **factors)
    assert_same(got, want)
    page, offset = divmod(int(inputs.slot_mapping[0]), inputs.case.page_size)
    largest = torch.finfo(target).max
    assert got[0][page, 0, offset, :4].float().tolist() == [largest, -largest] * 2
    back = got[1][page, :, offset].float()
    if scales != "none":
        back *= factors["v_scale"][:, None]
    torch.testing.assert_close(back, inputs.v[0].float(), rtol=0, atol=0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
def test_int8_index_keys(scale_dtype: torch.dtype) -> None:
    inputs = build(Case("int8", ((3, 20),)))
    inputs.index_k[4] = 0
    inputs.index_k[5] = torch.arange(32) - 16.5  # halves of a step: ties
    inputs.index_k[5, 0] = 127
    results = []
    for backend in ("triton", "reference"):
        pages = empty_pages(inputs.case, inputs.k_pages.shape[0])
        index_pages = torch.full(pages[2].shape, 99, dtype=torch.int8)
        scales = torch.full(pages[2].shape[:2], torch.nan, dtype=scale_dtype)
        store(inputs, (*pages[:2], index_pages), backend, index_k_scales=scales)
        results.append((index_pages, scales))
    assert_same(*results)
    index_pages, scales = results[0]
    for token, slot in enumerate(inputs.slot_mapping.tolist()):
        page, offset = divmod(slot, inputs.case.page_size)
        back = index_pages[page, offset].float() * scales[page, offset].float()
        # half a step, and what rounding the scale adds at the largest number
        allowed = scales[page, offset].float() * (0.5 + 127 * torch.finfo(scale_dtype).eps)
        assert (back - inputs.index_k[token]).abs().max() <= allowed
    untouched = torch.ones(index_pages.shape[0] * index_pages.shape[1], dtype=torch.bool)
    untouched[inputs.slot_mapping] = False
    assert (index_pages.flatten(0, 1)[untouched] == 99).all()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_cpu_families_refuse_what_they_cannot_write(backend: str) -> None:
    inputs = build(Case("refused", ((3, 2),)))
    pages = empty_pages(inputs.case, inputs.k_pages.shape[0])
    fp8 = (pages[0].to(FP8[0]), pages[1].to(FP8[0]), pages[2])
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        store(inputs, fp8, backend)
    with pytest.raises(NotImplementedError, match="and scales"):
        store(inputs, pages, backend, k_scale=torch.ones(1))


def test_scales_go_with_int8_index_keys_only() -> None:
    inputs = build(Case("scales", ((3, 2),)))
    pages = empty_pages(inputs.case, inputs.k_pages.shape[0])
    with pytest.raises(ValueError, match="index_k_scales must be given with int8"):
        store(inputs, pages, "reference", index_k_scales=torch.zeros(pages[2].shape[:2]))
    with pytest.raises(ValueError, match="got none for"):
        store(inputs, (*pages[:2], torch.zeros(pages[2].shape, dtype=torch.int8)), "reference")
    with pytest.raises(ValueError, match=r"k_scale must be \[1\] or \[num_kv_heads\] = \[2\]"):
        store(inputs, pages, "reference", k_scale=torch.ones(3))
