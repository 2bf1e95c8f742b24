"""Scales of an fp8 cache: every exporter's names, a rank's part, and numbers that are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3_plugin.checkpoint.cache_scales import (
    CacheScaleName,
    CacheScales,
    cache_scale_name,
)

CPU = torch.device("cpu")
ATTENTION = "model.layers.3.self_attn"
HEADS = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("k_proj.k_scale", "k"),
        ("v_proj.v_scale", "v"),
        ("k_proj.output_scale", "k"),
        ("v_proj.output_scale", "v"),
        ("k_scale", "k"),
        ("v_scale", "v"),
        ("attn.v_scale", "v"),
        ("kv_scale", "kv"),
        ("q_scale", "unused"),
        ("q_proj.output_scale", "unused"),
        ("prob_output_scale", "unused"),
        ("k_zero_point", "unused"),
    ],
)
def test_names(tensor: str, what: str) -> None:
    assert cache_scale_name(f"{ATTENTION}.{tensor}") == CacheScaleName(ATTENTION, what)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensor",
    ["k_proj.weight_scale", "k_proj.v_scale", "index_k_proj.k_scale", "o_proj.output_scale"],
)
def test_other_scales_are_none_of_the_cache(tensor: str) -> None:
    assert cache_scale_name(f"{ATTENTION}.{tensor}") is None


def scales(**tensors: Tensor) -> CacheScales:
    found = CacheScales()
    for name, values in tensors.items():
        named = cache_scale_name(f"{ATTENTION}.{name}")
        assert named is not None
        found = found.with_scale(named, values, tensor=name)
    return found


def test_numbers_are_flat_and_fp32_whatever_the_exporter_s_shape() -> None:
    found = scales(k_scale=HEADS.view(4, 1, 1).bfloat16(), v_scale=torch.tensor(0.5))
    assert found.k is not None
    assert found.v is not None
    assert (found.k.dtype, found.k.tolist(), found.v.tolist()) == (
        torch.float32,
        [1, 2, 3, 4],
        [0.5],
    )
    both = scales(kv_scale=torch.tensor([0.25]))
    assert both.k is not None
    assert both.k is both.v
    assert CacheScales().of_rank(num_kv_heads=4, rank=1, size=2, device=CPU) == CacheScales()


def test_scales_are_for_pages_of_8_bits_alone() -> None:
    scales = CacheScales(torch.tensor([0.5]), torch.tensor([2.0]))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert scales.for_pages(dtype) is scales
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert scales.for_pages(dtype) == CacheScales()


@pytest.mark.parametrize(
    ("rank", "size", "own"),
    [(0, 1, [1, 2, 3, 4]), (1, 2, [3, 4]), (3, 4, [4]), (5, 8, [3]), (7, 8, [4])],
)
def test_a_rank_has_the_scales_of_its_own_heads(rank: int, size: int, own: list[int]) -> None:
    found = scales(k_scale=HEADS, v_scale=torch.tensor([0.5]))
    part = found.of_rank(num_kv_heads=4, rank=rank, size=size, device=CPU)
    assert part.k is not None
    assert part.v is not None
    assert (part.k.tolist(), part.v.tolist()) == (own, [0.5])


@pytest.mark.parametrize("number", [0.0, -1.0, torch.inf, torch.nan])
def test_numbers_that_are_no_scale(number: float) -> None:
    with pytest.raises(ValueError, match="tensor k_scale scales an fp8 cache and must be positive"):
        scales(k_scale=torch.tensor([1.0, number]))


def test_scales_of_a_serving_layer_change_in_its_own_memory() -> None:
    served = CacheScales(torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    new = CacheScales(k=torch.tensor([5.0, 6.0])).in_place_of(served, layer="x")
    assert new.k is served.k
    assert new.v is served.v
    assert new.k is not None
    assert new.v is not None
    assert (new.k.tolist(), new.v.tolist()) == ([5, 6], [3])
    CacheScales(k=torch.tensor([7.0])).in_place_of(served, layer="x")
    assert new.k.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("served", "said"),
    [(CacheScales(), "unit scale"), (CacheScales(torch.ones(1), torch.ones(1)), "one scale")],
)
def test_scales_that_do_not_fit_a_serving_layer_are_refused(served: CacheScales, said: str) -> None:
    with pytest.raises(ValueError, match=rf"layers\.3 keeps its fp8 cache with {said}"):
        CacheScales(k=torch.ones(2)).in_place_of(served, layer="layers.3")
