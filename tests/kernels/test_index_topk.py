"""`index_topk`: every implementation against the reference, then what is special about blocks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.index_topk import index_topk
from m3_kernels.testing.cases import Case, Inputs, all_cases, build
from m3_kernels.testing.compare import selection_faults

BACKENDS: tuple[Backend, ...] = ("native", "torch")
EVERY_BACKEND: tuple[Backend, ...] = (*BACKENDS, "reference")


def select(inputs: Inputs, backend: Backend) -> Tensor:
    """Run the op into a buffer of garbage."""
    heads, topk = inputs.index_q.shape[1], inputs.case.topk
    out = torch.full((heads, inputs.index_q.shape[0], topk), 123456789, dtype=torch.int32)
    returned = index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        index_k_scales=inputs.index_k_scales,
        index_k_low=inputs.index_k_low,
        out=out,
        backend=backend,
    )
    assert returned is out
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_equals_the_reference(case: Case, backend: Backend) -> None:
    inputs = build(case)
    ids = select(inputs, backend)
    assert selection_faults(ids, select(inputs, "reference"), inputs) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_int8_keys_with_a_scale_each(case: Case, backend: Backend) -> None:
    inputs = build(dataclasses.replace(case, index_dtype=torch.int8))
    ids = select(inputs, backend)
    assert selection_faults(ids, select(inputs, "reference"), inputs) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_keys_in_two_planes(case: Case, backend: Backend) -> None:
    """Sums of integers: nothing is excused."""
    inputs = build(dataclasses.replace(case, index_dtype=PLANES_DTYPE))
    expected = select(inputs, "reference")
    assert torch.equal(select(inputs, backend), expected)
    # and the reference's own are those of the keys that the planes stand for
    plain = build(dataclasses.replace(case, dtype=torch.float32, index_dtype=PLANES_DTYPE))
    plain = dataclasses.replace(plain, index_q=inputs.index_q, sequences=inputs.sequences)
    assert selection_faults(expected, expected, plain) == []


def scaled_head(keys: list[tuple[int, float]]) -> Inputs:
    """As `one_head`, with int8 keys of one code and its scale each."""
    inputs = build(dataclasses.replace(one_head([0.0] * len(keys)).case, index_dtype=torch.int8))
    assert inputs.index_k_scales is not None
    inputs.index_q.zero_()
    inputs.index_q[..., 0] = 1
    for block, (code, scale) in enumerate(keys):
        page = int(inputs.page_table[0, block])
        inputs.index_k_pages[page] = 0
        inputs.index_k_pages[page, 0, 0] = code
        inputs.index_k_scales[page, 0] = scale
    return inputs


SCALED = [
    # scores 9, 128, 0, -72, 1 and the local block
    pytest.param(
        [(9, 1.0), (2, 64.0), (127, 0.0), (-9, 8.0), (1, 1.0)], [0, 1, 4], id="the-scale-decides"
    ),
    # scores -1, -0.0, 0.0, -0.0: a sum never is -0.0, but what it is scaled to
    pytest.param(
        [(-1, 1.0), (-9, 0.0), (9, 0.0), (-9, 0.0), (0, 1.0)], [1, 2, 4], id="zeros-are-equal"
    ),
    pytest.param([(9, 0.0), (-9, 0.0), (9, 0.0), (0, 1.0)], [0, 1, 3], id="zeros-again"),
]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("keys", "expected"), SCALED)
def test_ranking_of_scaled_keys(
    keys: list[tuple[int, float]], expected: list[int], backend: Backend
) -> None:
    assert select(scaled_head(keys), backend)[0, 0].tolist() == expected


def one_head(
    scores: list[float], *, topk: int = 3, num_local_blocks: int = 1, num_init_blocks: int = 0
) -> Inputs:
    """A decode step of one head whose blocks of one key each have exactly these scores."""
    case = Case(
        "scores",
        ((len(scores) - 1, 1),),
        num_q_heads=1,
        num_kv_heads=1,
        index_dim=32,
        page_size=1,
        topk=topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
    )
    inputs = build(case)
    inputs.index_q.zero_()
    inputs.index_q[..., 0] = 1
    for block, score in enumerate(scores):
        page = int(inputs.page_table[0, block])
        inputs.index_k_pages[page] = 0
        inputs.index_k_pages[page, 0, 0] = score
    return inputs


RANKINGS = [
    pytest.param([5, 1, 9, 2, 0], {}, [0, 2, 4], id="best-two-and-local"),
    pytest.param([7, 7, 7, 7, 7, 0], {}, [0, 1, 5], id="ties-to-the-lower-id"),
    pytest.param([1, 7, 9, 7, 7, 0], {}, [1, 2, 5], id="tie-at-the-edge"),
    pytest.param([7, 7, 9, 1, 0], {}, [0, 2, 4], id="later-best-displaces-the-higher-id"),
    pytest.param([0, -0.0, 0, -0.0, 0], {}, [0, 1, 4], id="zeros-are-equal"),
    pytest.param([math.nan, 1, math.nan, 2, 0], {}, [1, 3, 4], id="nan-loses"),
    pytest.param([math.nan, 1, 2, 3, math.nan], {}, [2, 3, 4], id="nan-local-is-kept"),
    pytest.param([-math.inf] * 6, {}, [0, 1, 5], id="minus-infinity-can-be-chosen"),
    pytest.param([math.nan] * 6, {}, [0, 1, 5], id="all-nan"),
    pytest.param([1, math.inf, 2, math.inf, math.inf, 0], {}, [1, 3, 5], id="infinite-ties"),
    pytest.param([3e38, 9, 8, 3e38, 0, -1], {"topk": 2}, [0, 5], id="local-beats-any-score"),
    pytest.param([0, 9, 8, 7, 6, 5], {"num_init_blocks": 1}, [0, 1, 5], id="init"),
    pytest.param(
        [0, 9, 8, 7, 6, 5],
        {"num_init_blocks": 2, "num_local_blocks": 2},
        [0, 1, 4],
        id="init-before-local-and-better-local-first",
    ),
    pytest.param(
        [0, 9, 8, 7, 5, 5],
        {"num_init_blocks": 2, "num_local_blocks": 2},
        [0, 1, 4],
        id="equal-locals",
    ),
    pytest.param([4, 9, 8, 7, 6, 5], {"num_init_blocks": 5}, [1, 2, 3], id="best-of-init"),
    pytest.param([4, 9, 8, 7, 6, 1], {"num_local_blocks": 0}, [1, 2, 3], id="no-local"),
    pytest.param([4, 9, 8], {"num_local_blocks": 5, "topk": 4}, [0, 1, 2, -1], id="tail"),
]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("scores", "rules", "expected"), RANKINGS)
def test_ranking(
    scores: list[float], rules: dict[str, int], expected: list[int], backend: Backend
) -> None:
    assert select(one_head(scores, **rules), backend)[0, 0].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.tuples(st.integers(0, 300), st.integers(1, 20)),
    topk=st.integers(1, 12),
    num_local_blocks=st.integers(0, 3),
    num_init_blocks=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_scores_full_of_ties_are_ranked_exactly_alike(
    lengths: tuple[int, int], topk: int, num_local_blocks: int, num_init_blocks: int, seed: int
) -> None:
    case = Case(
        "ties",
        (lengths,),
        page_size=8,
        topk=topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        seed=seed,
    )
    inputs = build(case)
    # Small integers: few different scores, and all of them exact in any order of summation.
    for tensor in (inputs.index_q, inputs.index_k_pages):
        tensor.copy_(tensor.clamp(-1, 1).round())
    ids = {backend: select(inputs, backend) for backend in EVERY_BACKEND}
    assert torch.equal(ids["native"], ids["reference"])
    assert torch.equal(ids["torch"], ids["reference"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [40, 128])
@pytest.mark.parametrize("distance", [1, 16, 32, -16])
def test_a_nan_hides_no_other_key_of_its_block(size: int, distance: int, backend: Backend) -> None:
    decoys = 10
    case = Case(
        "nan",
        (((size + decoys) * size, 1),),
        num_q_heads=1,
        num_kv_heads=1,
        page_size=size,
        topk=size + 1,
    )
    inputs = build(case)
    inputs.index_q.zero_()
    inputs.index_q[..., 0] = 1
    for block, page in enumerate(inputs.page_table[0, : size + decoys].tolist()):
        inputs.index_k_pages[page, :, 0] = 1 if block >= size else 0
        if block < size:
            inputs.index_k_pages[page, (block + distance) % size, 0] = 5
            inputs.index_k_pages[page, block, 0] = math.nan
    assert select(inputs, backend)[0, 0].tolist() == [*range(size), size + decoys]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_blocks_start_at_the_sequence_not_at_the_page(backend: Backend) -> None:
    inputs = build(Case("local", ((0, 70),), topk=2))
    ids = select(inputs, backend)
    own = torch.arange(70) // inputs.case.page_size
    assert (ids == own[:, None]).any(dim=2).all()
    assert ((ids >= 0).sum(dim=2) == (own + 1).clamp(max=2)).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_key_that_arrives_later_does_not_raise_the_block(backend: Backend) -> None:
    inputs = build(Case("future", ((0, 64),), num_local_blocks=0, topk=1, num_kv_heads=1))
    before = select(inputs, backend)
    # The last key of block 1 becomes the best of all; rows before it must not notice.
    page = int(inputs.page_table[0, 1])
    inputs.index_k_pages[page, 15] = 1e4 * inputs.index_q[30, 0]
    after = select(inputs, backend)
    assert torch.equal(before[:, :31], after[:, :31])
    inputs.index_q[31:, 0] = inputs.index_q[30, 0]
    assert (select(inputs, backend)[0, 31:, 0] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_context_with_a_workspace_of_several_chunks(backend: Backend) -> None:
    case = Case("long", ((40_000, 40),), page_size=16, topk=16, num_kv_heads=2, index_dim=32)
    inputs = build(case)
    few = dataclasses.replace(
        inputs,
        index_q=inputs.index_q[-2:],
        cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
    )
    ids = select(inputs, backend)[:, -2:]
    assert selection_faults(ids, select(few, "reference"), few) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_be_a_view(backend: Backend) -> None:
    inputs = build(Case("view", ((0, 60),)))
    larger = torch.full((60, 2, 9), -5, dtype=torch.int32)
    view = larger[:, :, 2:6].transpose(0, 1)
    index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        out=view,
        backend=backend,
    )
    assert torch.equal(view, select(inputs, backend))
    assert (larger[:, :, :2] == -5).all()
    assert (larger[:, :, 6:] == -5).all()
