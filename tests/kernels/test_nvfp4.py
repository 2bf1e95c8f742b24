"""Rounding to NVFP4 against the published ladder, read one number at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3_kernels.cache_store.nvfp4 import nvfp4_index_keys, nvfp4_values

# E4M3's numbers from zero on, each named by its code
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()


def nearest_e4m3(value: float) -> float:
    """The nearest of E4M3's numbers, of two as near the one with the even code."""
    distances = [abs(value - number) for number in E4M3]
    least = min(distances)
    codes = [code for code, distance in enumerate(distances) if distance == least]
    return E4M3[next((code for code in codes if code % 2 == 0), codes[0])]


def ladder(size: float) -> float:
    """The published steps, in their order."""
    if size > 5:
        return 6.0
    if size >= 3.5:
        return 4.0
    if size > 2.5:
        return 3.0
    if size >= 1.75:
        return 2.0
    if size > 1.25:
        return 1.5
    if size >= 0.75:
        return 1.0
    return 0.5 if size > 0.25 else 0.0


def slow(values: Tensor) -> Tensor:
    """One number after another; divisions in fp32, as published."""
    out = torch.empty_like(values, dtype=torch.float32)
    for group, written in zip(
        values.float().reshape(-1, 16), out.view(-1, 16).unbind(0), strict=True
    ):
        largest = torch.tensor(max(float(group.abs().max()), 1e-12))
        scale = nearest_e4m3(min(max(float(largest / 6), 1 / 512), 448.0))
        for place, value in enumerate(group):
            ratio = float(value / torch.tensor(scale))
            magnitude = ladder(abs(ratio)) * scale
            written[place] = -magnitude if ratio < 0 and magnitude else magnitude
    return out


def test_every_tie_goes_where_it_is_published_to_go() -> None:
    """A group whose largest number is 6 has a scale of one."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    group = torch.tensor(ties + [-tie for tie in ties])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    rounded = nvfp4_values(group)
    assert rounded.tolist() == expected + [-number for number in expected]
    # zero has one code
    assert not rounded.signbit()[rounded == 0].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-14, 1e-4, 0.01, 1.0, 30.0, 2000.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_numbers(seed: int, size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(3, 32, generator=generator) * size).clamp(-6e4, 6e4).to(dtype)
    rounded = nvfp4_values(values)
    assert torch.equal(rounded, slow(values))
    # what is kept in bf16 is kept whole, and rounding it again changes nothing
    assert torch.equal(rounded.bfloat16().float(), rounded)
    index = nvfp4_index_keys(values)
    assert torch.equal(index, rounded.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_a_nan_stays_seen_and_within_its_group() -> None:
    values = torch.full((32,), 6.0)
    values[3] = float("nan")
    rounded = nvfp4_values(values)
    assert rounded[:16].isnan().all()
    assert torch.equal(rounded[16:], values[16:])


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 16 channels; got 24 of them"):
        nvfp4_values(torch.zeros(2, 24))
