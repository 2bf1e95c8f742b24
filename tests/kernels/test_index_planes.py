"""Index keys in two planes: the choice is that of all 16 bits, whatever they hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3_kernels.cache_store.reference import in_two_planes
from m3_kernels.cache_store.torch_cpu import LARGEST_CODE, in_planes
from m3_kernels.capability import Backend
from m3_kernels.index_pages import (
    PLANES_DTYPE,
    PLANES_SCALE_DTYPE,
    IndexViews,
    channels,
    split_planes,
)
from m3_kernels.index_topk import index_topk
from m3_kernels.index_topk.torch_cpu import in_fixed_point

pytestmark = pytest.mark.usefixtures("two_threads")

BACKENDS: tuple[Backend, ...] = ("native", "torch")
DIM, PAGE = 32, 16


def in_pages(keys: Tensor, *, page_size: int = PAGE) -> tuple[IndexViews, Tensor]:
    """Keys [tokens, dim] in pages out of order, and the page table of their one sequence."""
    blocks = -(-keys.shape[0] // page_size)
    width = channels(keys.shape[1], PLANES_DTYPE)
    memory = torch.full((blocks + 1, page_size, width), 0x6363, dtype=PLANES_DTYPE)
    views = split_planes(memory)
    order = torch.randperm(blocks + 1, generator=torch.Generator().manual_seed(0))[:blocks]
    slots = torch.arange(keys.shape[0])
    at = order[slots // page_size], slots % page_size
    assert views.low is not None
    assert views.scales is not None
    views.keys[at], views.low[at], views.scales[at] = in_planes(keys, PLANES_SCALE_DTYPE)
    return views, order.int()[None]


def choose(
    queries: Tensor, keys: Tensor, backend: Backend, *, topk: int = 4, **rules: Any
) -> Tensor:
    """Ids of the last rows of one sequence of these keys."""
    views, page_table = in_pages(keys)
    return index_topk(
        queries,
        views.keys,
        page_table=page_table,
        cu_seqlens_q=torch.tensor([0, queries.shape[0]], dtype=torch.int32),
        seq_lens=torch.tensor([keys.shape[0]], dtype=torch.int32),
        topk=topk,
        index_k_scales=views.scales,
        index_k_low=views.low,
        backend=backend,
        **rules,
    )


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_huge_channel(keys: Tensor) -> Tensor:
    keys[:, 5] *= 1000
    return keys


def huge_outliers(keys: Tensor) -> Tensor:
    keys[::37, 3] = 3e38
    keys[5::37] *= 1e-30
    return keys


def equal(keys: Tensor) -> Tensor:
    return keys[:1].expand_as(keys).contiguous()


def last_bit(keys: Tensor) -> Tensor:
    """Blocks whose keys differ in one unit of one channel."""
    keys[:] = torch.linspace(-1, 1, DIM)
    keys[:, 0] += torch.randint(0, 5, (len(keys),), generator=torch.Generator().manual_seed(1)) / (
        127 * 256
    )
    return keys


def not_finite(keys: Tensor) -> Tensor:
    keys[3::11, 2] = math.nan
    keys[4::13, 7] = math.inf
    keys[5::17, 7] = -math.inf
    return keys


def all_but_few_not_finite(keys: Tensor) -> Tensor:
    keys[50:-20] = math.nan
    return keys


def denormal(keys: Tensor) -> Tensor:
    keys[::2] *= 1e-40
    keys[1::2] *= 1e-38
    return keys


KEYS = (
    lambda keys: keys,
    one_huge_channel,
    huge_outliers,
    equal,
    torch.zeros_like,
    last_bit,
    not_finite,
    all_but_few_not_finite,
    denormal,
    lambda keys: keys.round(),
    lambda keys: torch.full_like(keys, math.nan),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", range(len(KEYS)))
@pytest.mark.parametrize("rows", [1, 4, 37])
def test_the_choice_is_that_of_all_bits(kind: int, rows: int, backend: Backend) -> None:
    queries, keys = numbers(1, rows, 3, DIM), KEYS[kind](numbers(2, 60 * PAGE - 5, DIM))
    queries[0, 1] = 0
    expected = choose(queries, keys, "reference")
    assert torch.equal(choose(queries, keys, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [lambda keys: keys, equal])
def test_tokens_behind_a_row_count_for_later_rows_alone(
    kind: Callable[[Tensor], Tensor], backend: Backend
) -> None:
    """The last token is by far the best, and no block is forced."""
    queries, keys = numbers(5, 1, 3, DIM).abs().repeat(6, 1, 1), kind(numbers(6, 90 * PAGE, DIM))
    keys[-8:] = -1.0
    keys[-1] = 100.0
    ids = choose(queries, keys, backend, num_local_blocks=0)
    assert torch.equal(ids, choose(queries, keys, "reference", num_local_blocks=0))
    assert (ids == 89).any(-1)[:, -1].all()
    assert not (ids == 89).any(-1)[:, :-1].any()


def equal_in_places(keys: Tensor) -> Tensor:
    """From the tenth of the keys on to the half, in every second page behind, and at the end."""
    page = torch.arange(len(keys)) // PAGE
    half = int(page[-1]) // 2
    first, second = (page > half // 5) & (page < half), (page > half) & (page % 2 == 0)
    keys[first | second | (page > 2 * half - 9)] = keys[0].clone()
    return keys


@pytest.mark.parametrize("rows", [1, 5, 9])
@pytest.mark.parametrize("topk", [4, 16])
@pytest.mark.parametrize("kind", [equal, equal_in_places, last_bit, lambda keys: keys])
def test_crowds_that_come_and_go_are_chosen_from_alike(
    kind: Callable[[Tensor], Tensor], topk: int, rows: int
) -> None:
    """700 blocks are ranges enough that some look whether the crowd has ended."""
    queries, keys = numbers(3, rows, 4, DIM), kind(numbers(4, 700 * PAGE - 3, DIM))
    expected = choose(queries, keys, "reference", topk=topk)
    assert torch.equal(choose(queries, keys, "native", topk=topk), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rules",
    [
        {"num_init_blocks": 2, "num_local_blocks": 2},
        {"num_init_blocks": 9},
        {"num_local_blocks": 9},
        {"num_local_blocks": 0},
        {"topk": 1},
        {"topk": 16},
        {"topk": 100},
    ],
)
def test_forced_blocks_and_few_blocks(rules: dict[str, int], backend: Backend) -> None:
    queries, keys = numbers(3, 5, 2, DIM), numbers(4, 30 * PAGE + 1, DIM)
    expected = choose(queries, keys, "reference", **rules)
    assert torch.equal(choose(queries, keys, backend, **rules), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_scores_nothing(bad: float, backend: Backend) -> None:
    queries = numbers(5, 2, 2, DIM)
    queries[0, 0, 3] = bad
    ids = choose(queries, numbers(6, 20 * PAGE, DIM), backend)
    assert ids[0, 0].tolist() == [0, 1, 2, 19]
    assert torch.equal(ids, choose(queries, numbers(6, 20 * PAGE, DIM), "reference"))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 25 * PAGE),
    rows=st.integers(1, 9),
    exponent=st.integers(-30, 30),
    alphabet=st.integers(0, 3),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
)
def test_any_inputs(
    seed: int, tokens: int, rows: int, exponent: int, alphabet: int, spread: float
) -> None:
    """Coarse numbers make ties, a spread of sizes per token makes scales that differ."""
    keys, queries = numbers(seed, tokens, DIM), numbers(seed + 1, min(rows, tokens), 2, DIM)
    if alphabet:
        keys, queries = (keys * alphabet).round(), (queries * alphabet).round()
    keys = keys * 2.0**exponent * torch.exp(spread * numbers(seed + 2, tokens, 1))
    expected = choose(queries, keys, "reference")
    for backend in BACKENDS:
        assert torch.equal(choose(queries, keys, backend), expected)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.0, 1.0, 10.0]), dim=st.integers(1, 64))
def test_the_high_plane_bounds_the_score(seed: int, spread: float, dim: int) -> None:
    """The inequality that docs/index-planes.md derives, in the integers and in fp32."""
    keys = numbers(seed, 50, dim) * torch.exp(spread * numbers(seed + 1, 50, dim))
    high, low, scales = in_planes(keys, PLANES_SCALE_DTYPE)
    query = in_fixed_point(numbers(seed + 2, dim) * torch.exp(spread * numbers(seed + 3, dim)))
    highs, lows = high.double() @ query.double(), low.double() @ query.double()
    total = query.abs().sum()
    assert bool((lows.abs() <= 128 * total).all())
    scores = (256 * highs + lows).float() * scales.float()
    # sums of fp32 in any order, as the kernel takes them where it multiplies whole tiles
    summed = high.float() @ query.float()
    slack = total * (128.02 + 0.002 * dim)
    for found in (highs.float(), summed):
        assert bool((scores <= (found * 256 + slack) * scales.float()).all())


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-45, 37))
def test_codes_hold_a_key_to_half_a_step(seed: int, exponent: int) -> None:
    keys = numbers(seed, 8, DIM) * 10.0**exponent
    keys = torch.where(keys.isfinite(), keys, 0)
    high, low, scales = in_planes(keys, PLANES_SCALE_DTYPE)
    steps = scales.double()[:, None] / 256
    read = (256 * high.double() + low.double()) * steps
    inside = (keys.double().abs() <= LARGEST_CODE * steps).all(dim=1)
    # only subnormal scales are too coarse for their key
    assert bool((inside | (scales.float() < 1e-37)).all())
    error = (read - keys.double()).abs()[inside]
    assert bool((error <= 0.51 * steps.expand_as(keys)[inside]).all())
    for i in range(2):
        mine = in_two_planes(keys[i].tolist())
        assert (mine[0], mine[1]) == (high[i].tolist(), low[i].tolist())
        assert float(mine[2]) == float(scales[i])
