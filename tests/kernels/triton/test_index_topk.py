"""The Triton kernels of `index_topk` in the interpreter, against the reference."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3_kernels.index_topk import index_topk
from m3_kernels.index_topk.reference import dequantised
from m3_kernels.index_topk.traffic import index_topk_traffic
from m3_kernels.paged import IndexPages
from m3_kernels.testing.calls import chosen, index_call
from m3_kernels.testing.cases import Case, Inputs, all_cases, build
from m3_kernels.testing.compare import selection_faults
from m3_kernels.work_plan import WorkPlan, make_work_plan
from tests.kernels.test_addressing import FAR_PAGE, far_pool
from tests.kernels.test_index_topk import RANKINGS, SCALED, one_head, scaled_head

few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def last_rows(case: Case, most: int = 12) -> Case:
    """The same sequences with fewer query rows: the interpreter takes its time with every row."""
    requests = tuple((cached + max(0, n - most), min(n, most)) for cached, n in case.requests)
    return dataclasses.replace(case, requests=requests)


# The interpreter computes with bf16 as if its bits were an integer.
CASES = [
    case if case.missing_keys or case.name == "prefill" else last_rows(case)
    for case in all_cases()
    if case.dtype != torch.bfloat16
]
# Verify rows whose own block is not forced: its score must leave out the keys of later rows.
OWN_BLOCK = Case(
    "verify-no-local", ((90, 8), (24, 8), (29, 8), (50, 8)), topk=2, num_local_blocks=0
)
MIXED = Case("mixed", ((200, 1), (90, 4), (0, 10), (0, 0), (95, 9), (31, 1), (126, 2)), topk=5)


def plan_of(inputs: Inputs, num_programs: int | None = None) -> WorkPlan:
    return make_work_plan(
        cu_seqlens_q=inputs.cu_seqlens_q,
        seq_lens=inputs.seq_lens,
        num_rows=inputs.index_q.shape[0],
        page_size=inputs.case.page_size,
        num_programs=num_programs,
        backend="reference",
    )


def run(
    inputs: Inputs,
    *,
    arch: int | None = None,
    use_descriptors: bool | None = None,
    index_k_scales: Tensor | None = None,
    **changes: Any,
) -> Tensor:
    """The kernels into a buffer of garbage."""
    from m3_kernels.index_topk.triton import index_topk_triton

    call = index_call(inputs, keys=IndexPages(inputs.index_k_pages, index_k_scales), **changes)
    index_topk_triton(call, arch=arch, use_descriptors=use_descriptors)
    return call.out


@pytest.mark.parametrize(
    ("case", "use_descriptors"),
    [
        pytest.param(case, way == "descriptors", id=f"{case.name}-{way}")
        for case, way in zip([*CASES, OWN_BLOCK], itertools.cycle(("pointers", "descriptors")))
    ],
)
def test_equals_the_reference(case: Case, use_descriptors: bool) -> None:
    inputs = build(case)
    ids = run(inputs, use_descriptors=use_descriptors)
    assert selection_faults(ids, chosen(inputs), inputs) == []


def test_is_reached_through_the_op() -> None:
    inputs = build(MIXED)
    ids = index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        plan=plan_of(inputs),
        workspace=torch.full((30000,), torch.nan),
        backend="triton",
    )
    assert selection_faults(ids, chosen(inputs), inputs) == []


@pytest.mark.parametrize(("scores", "rules", "expected"), RANKINGS)
def test_ranking(scores: list[float], rules: dict[str, int], expected: list[int]) -> None:
    assert run(one_head(scores, **rules))[0, 0].tolist() == expected


@pytest.mark.parametrize(("keys", "expected"), SCALED)
def test_ranking_of_scaled_keys(keys: list[tuple[int, float]], expected: list[int]) -> None:
    inputs = scaled_head(keys)
    assert run(inputs, index_k_scales=inputs.index_k_scales)[0, 0].tolist() == expected


def coarse(case: Case) -> Inputs:
    """Inputs whose dot products are exact and mostly equal to others."""
    inputs = build(case)
    inputs.index_q.copy_(inputs.index_q.sign())
    pages = inputs.index_k_pages
    pages[:, :, 4:] = torch.where(pages[:, :, 4:].isnan(), torch.nan, 0.0)
    pages[:, :, :4] = pages[:, :, :4].sign()
    return inputs


@few
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 120), st.sampled_from([0, 1, 2, 7, 8, 9, 12])), max_size=3
    ),
    topk=st.integers(1, 7),
    num_local_blocks=st.integers(0, 3),
    num_init_blocks=st.integers(0, 3),
    page_size=st.sampled_from([4, 16, 20]),
    seed=st.integers(0, 1000),
)
def test_ties_are_ranked_exactly_alike(requests: list[tuple[int, int]], **rules: Any) -> None:
    inputs = coarse(Case("ties", tuple(requests), **rules))
    assert torch.equal(run(inputs), chosen(inputs))


@pytest.mark.parametrize("num_programs", [1, 40])
def test_bits_do_not_depend_on_who_computes_them(num_programs: int) -> None:
    inputs = build(MIXED)
    size = 30000
    scores = [torch.full((size,), -7.0) for _ in range(2)]
    ids = [
        run(inputs, plan=plan_of(inputs, programs), workspace=workspace)
        for programs, workspace in zip((2, num_programs), scores, strict=True)
    ]
    assert torch.equal(*ids)
    assert torch.equal(*scores)


@pytest.mark.parametrize("case", [MIXED, Case("verify", ((90, 4), (13, 4), (29, 4)), topk=3)])
def test_a_row_equals_its_own_step(case: Case) -> None:
    """Verify rows, some of which cross into a new block, beside the step of one row they stand for.

    4 rows and 2 heads keep the tile's width, so the library under the interpreter adds alike.
    """
    inputs = build(case)
    ids = run(inputs)
    bounds = inputs.cu_seqlens_q.tolist()
    for request, seq_len in enumerate(inputs.seq_lens.tolist()):
        first, last = bounds[request : request + 2]
        for row in (first, last - 1) if first < last else ():
            alone = dataclasses.replace(
                inputs,
                index_q=inputs.index_q[row : row + 1],
                page_table=inputs.page_table[request : request + 1],
                cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
                seq_lens=torch.tensor([seq_len - (last - 1 - row)], dtype=torch.int32),
            )
            assert torch.equal(run(alone)[:, 0], ids[:, row]), (request, row)


@pytest.mark.parametrize("rows", [2, 8, 9, 20])
def test_a_key_that_arrives_later_does_not_raise_the_block(rows: int) -> None:
    """The first row stands just before the last key of its own block, which is not forced."""
    inputs = build(Case("future", ((30, rows),), num_local_blocks=0, topk=1, num_kv_heads=1))
    first, own = inputs.page_table[0, :2].tolist()
    inputs.index_q[1, 0] = inputs.index_q[0, 0]
    inputs.index_k_pages[first, 0] = 10 * inputs.index_q[0, 0]
    inputs.index_k_pages[own, 15] = 1e4 * inputs.index_q[0, 0]
    assert run(inputs)[0, :2, 0].tolist() == [0, 1]


@pytest.mark.parametrize("rows", [1, 8, 12])
def test_slots_past_the_edge_of_a_page_score_nothing(rows: int) -> None:
    """A tile of keys is a power of two, a page need not be; zeros would beat what is negative."""
    inputs = build(Case("edge", ((115, rows),), page_size=20, topk=2, num_local_blocks=0))
    inputs.index_q.abs_()
    inputs.index_k_pages.abs_().neg_()
    assert torch.equal(run(inputs), chosen(inputs))


def test_prefill_in_passes() -> None:
    """A workspace that holds few rows' scores changes nothing; one that holds none is refused."""
    inputs = build(Case("passes", ((100, 14), (3, 12)), topk=3))
    blocks = plan_of(inputs).max_blocks
    whole = run(inputs)
    decode = 2 * 8 * 2 * blocks
    small = torch.full((decode,), torch.nan)
    assert torch.equal(run(inputs, workspace=small), whole)
    with pytest.raises(ValueError, match=f"workspace must hold {decode} scores for 2 requests"):
        run(inputs, workspace=small[: decode - 1])


def test_a_plan_of_another_step_is_refused() -> None:
    inputs = build(MIXED)
    plan = plan_of(build(Case("other", ((5, 1),))))
    with pytest.raises(ValueError, match="plan must be of this step's 7 requests, 27 rows"):
        run(inputs, plan=plan)


def quantised(inputs: Inputs, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """Index keys in 8 bits with one scale per token, and sequences of what they stand for.

    Slots without a key keep a scale of NaN.
    """
    pages = inputs.index_k_pages.float()
    top = 127.0 if dtype == torch.int8 else 448.0
    scales = pages.abs().amax(dim=2) / top
    stored = pages / scales[:, :, None]
    stored = stored.round().nan_to_num(99) if dtype == torch.int8 else stored
    stored = stored.to(dtype)
    # Some scales that fit no key's size: without them other blocks would win.
    scales = scales * torch.rand(scales.shape, generator=torch.Generator().manual_seed(1))
    meant = dequantised(stored, scales)
    size = inputs.case.page_size
    sequences = []
    for request, (k, v, index_k) in enumerate(inputs.sequences):
        used = inputs.page_table[request, : -(-len(index_k) // size)].long()
        sequences.append((k, v, meant[used].flatten(0, 1)[: len(index_k)]))
    return dataclasses.replace(inputs, index_k_pages=stored, sequences=tuple(sequences)), scales


@pytest.mark.parametrize("use_descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=["int8", "e4m3", "e5m2"]
)
def test_keys_of_8_bits(dtype: torch.dtype, use_descriptors: bool) -> None:
    inputs, scales = quantised(build(MIXED.with_dtype(torch.float16)), dtype)
    ids = run(inputs, index_k_scales=scales, use_descriptors=use_descriptors, arch=90)
    expected = index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        index_k_scales=scales,
        **inputs.batch,
        **inputs.selection,
        backend="reference",
    )
    assert selection_faults(ids, expected, inputs) == []
    plain = build(MIXED.with_dtype(torch.float16))
    assert not torch.equal(ids, chosen(plain)), "scales changed nothing: no test"


def test_refusals_name_the_alternative() -> None:
    inputs, scales = quantised(build(MIXED), torch.float8_e4m3fn)
    with pytest.raises(
        NotImplementedError, match=r"capability 8\.9; this device has 8\.6\. Keep.*int8"
    ):
        run(inputs, index_k_scales=scales, arch=86)
    call = {**inputs.batch, **inputs.selection}
    for backend in ("native", "torch"):
        with pytest.raises(
            NotImplementedError, match=f"backend '{backend}' takes index keys of float32"
        ):
            index_topk(inputs.index_q, inputs.index_k_pages, **call, backend=backend)
    pages = inputs.index_k_pages
    with pytest.raises(ValueError, match="index_k_scales must be given with int8"):
        index_topk(inputs.index_q, pages.to(torch.int8), **call)
    with pytest.raises(ValueError, match=r"index_k_scales must be \[P, page_size\]"):
        index_topk(inputs.index_q, pages, index_k_scales=scales[:, :3], **call)
    keys = pages.float()
    with pytest.raises(ValueError, match="index_k_scales must be None unless"):
        index_topk(inputs.index_q, keys, index_k_scales=scales, **call)
    workspace = torch.zeros(9, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"workspace must be torch\.float32"):
        index_topk(inputs.index_q, keys, **call, workspace=workspace, backend="triton")


def test_addresses_beyond_32_bits() -> None:
    case = Case("far", ((60, 3), (40, 9)), head_dim=16, index_dim=136, dtype=torch.float16)
    near = build(case)
    far = dataclasses.replace(
        near,
        index_k_pages=far_pool(near.index_k_pages),
        page_table=near.page_table.where(near.page_table < 0, near.page_table + FAR_PAGE),
    )
    assert torch.equal(run(far), run(near))


class Counter:
    """Launches, and numbers loaded from one tensor, of interpreted kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: Tensor) -> None:
        from triton.runtime import interpreter

        self.loads = 0
        self.launches = 0
        low = watched.data_ptr()
        high = low + watched.untyped_storage().nbytes()
        masked_load = interpreter.InterpreterBuilder.create_masked_load
        launch = interpreter.InterpretedFunction.run

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            inside = (pointers.data >= low) & (pointers.data < high) & mask.data
            self.loads += int(inside.sum())
            return masked_load(builder, pointers, mask, *rest)

        def counted_launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            return launch(kernel, *args, **kwargs)

        builder = interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted_launch)


GEOMETRY = {"num_index_heads": 4, "index_dim": 128, "page_size": 128, "topk": 16}


@pytest.mark.parametrize(
    ("requests", "rows_in_passes"),
    [
        pytest.param(((200, 1), (90, 1)), None, id="decode"),
        pytest.param(((90, 4), (126, 4), (0, 4)), None, id="verify"),
        pytest.param(((0, 10), (7, 40), (64, 3)), None, id="prefill"),
        pytest.param(((0, 10), (7, 40), (64, 3)), 40, id="prefill-in-passes"),
    ],
)
def test_reads_what_the_traffic_says(
    requests: tuple[tuple[int, int], ...],
    rows_in_passes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = build(Case("traffic", requests, index_dim=16, page_size=16, topk=3))
    plan = plan_of(inputs, 3)
    workspace = None
    if rows_in_passes:
        workspace = torch.empty(rows_in_passes * 2 * plan.max_blocks)
    counter = Counter(monkeypatch, inputs.index_k_pages)
    run(inputs, plan=plan, workspace=workspace)
    expected = index_topk_traffic(
        [(int(length), n) for length, (_, n) in zip(inputs.seq_lens, requests, strict=True)],
        num_index_heads=2,
        index_dim=16,
        page_size=16,
        topk=3,
        key_bytes=4,
        tile_rows=32,
        pass_rows=rows_in_passes,
    )
    assert counter.loads * 4 == expected.key_bytes + expected.prefill_key_bytes
    assert counter.launches == expected.launches


@pytest.mark.parametrize(
    ("requests", "key_bytes", "megabytes"),
    [
        ([(2**20, 1)], 2, 268),
        ([(2**20, 1)], 1, 134),
        ([(2**17, 1)] * 64, 2, 2147),
        ([(2**15, 4)] * 16, 2, 134),
    ],
)
def test_decode_stays_at_the_roofline(
    requests: list[tuple[int, int]], key_bytes: int, megabytes: int
) -> None:
    """Keys are read once for all heads and verify rows; scores are noise; two launches."""
    traffic = index_topk_traffic(requests, key_bytes=key_bytes, **GEOMETRY)
    assert round(traffic.key_bytes / 1e6) == megabytes
    assert traffic.score_bytes < 0.04 * traffic.key_bytes
    assert traffic.launches == 2
