"""`norm_rope_store`: the maths, what is written, rounding, and refusals."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from m3_kernels.cache_store import cache_store
from m3_kernels.capability import Backend
from m3_kernels.testing.cases import Case, empty_pages
from tests.kernels.norm_rope import (
    GIVEN,
    ODD,
    STEP,
    assert_close,
    results,
    rows_of,
    run,
    step_of,
    stored_rows,
)

EVERY_BACKEND: tuple[Backend, ...] = ("native", "torch", "reference")
BF16 = (STEP.with_dtype(torch.bfloat16), torch.float32)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("given", [*GIVEN, BF16], ids=lambda given: given[0].name)
def test_equals_exact_arithmetic(given: tuple[Case, torch.dtype], backend: Backend) -> None:
    case, table_dtype = given
    step = step_of(case, table_dtype=table_dtype)
    assert_close(results(step, backend), step)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_zero_row_stays_zero(backend: Backend) -> None:
    step = step_of(STEP)
    step.given.q[0] = 0
    assert (results(step, backend)["q"][0] == 0).all()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", [STEP, ODD, STEP.with_dtype(torch.bfloat16)], ids=lambda c: c.name)
def test_a_row_s_bits_do_not_depend_on_the_others(case: Case, backend: Backend) -> None:
    step = step_of(case)
    together = results(step, backend)
    for row in range(len(step.slot_mapping)):
        alone = rows_of(step, row, row + 1)
        found = results(alone, backend)
        assert torch.equal(found["q"][0], together["q"][row])
        assert torch.equal(found["index_q"][0], together["index_q"][row])
        for name in ("k", "index_k"):
            own = stored_rows(found[name], alone)
            assert torch.equal(own, stored_rows(together[name], alone))


def test_a_team_of_threads_gives_the_bits_of_one() -> None:
    """Rows enough for more than one thread to be woken."""
    case = Case("many", ((0, 700),), num_q_heads=32, num_kv_heads=4, head_dim=128, index_dim=128)
    step = step_of(case)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(step, "native"))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_narrower_cache_gets_what_the_activations_dtype_holds(backend: Backend) -> None:
    """As if a host had normalised in its dtype and then stored."""
    step = step_of(STEP)
    wide = results(step, backend)
    pages = tuple(
        page.to(torch.float16)
        for page in empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])
    )
    run(step, pages, backend)
    got = stored_rows(pages[0], step)
    assert torch.equal(got, stored_rows(wide["k"], step).half())


def test_eight_bits_as_cache_store_writes_them() -> None:
    step = step_of(STEP)
    inputs = step.inputs
    shapes = [page.shape for page in empty_pages(inputs.case, inputs.k_pages.shape[0])]
    scale = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([2.0, 0.25])}

    def empty() -> tuple[Any, ...]:
        pages = [torch.zeros(shape).to(torch.float8_e5m2) for shape in shapes[:2]]
        return *pages, torch.zeros(shapes[2], dtype=torch.int8), torch.zeros(shapes[2][:2])

    *fused, fused_scales = empty()
    run(step, tuple(fused), "reference", index_k_scales=fused_scales, **scale)
    plain = results(step, "reference")
    slots = inputs.slot_mapping >= 0
    *apart, apart_scales = empty()
    cache_store(
        stored_rows(plain["k"], step),
        step.given.v[slots],
        stored_rows(plain["index_k"], step),
        *apart,
        slot_mapping=inputs.slot_mapping[slots],
        index_k_scales=apart_scales,
        backend="reference",
        **scale,
    )
    for a, b in zip((*fused, fused_scales), (*apart, apart_scales), strict=True):
        assert torch.equal(a.float(), b.float())
    assert any(page.float().any() for page in fused)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_slots_outside_the_pool_write_nothing(backend: Backend) -> None:
    step = step_of(STEP)
    pages = empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])
    step.slot_mapping[-1] = pages[2].shape[0] * pages[2].shape[1]
    with pytest.raises(IndexError, match="slot_mapping must"):
        run(step, pages, backend)
    assert all(page.isnan().all() for page in pages)


def test_refusals_name_the_argument() -> None:
    step = step_of(STEP)
    pages = empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])

    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        given = dataclasses.replace(step.given, **changes)
        with pytest.raises(error, match=re.escape(words)):
            run(dataclasses.replace(step, given=given), pages, "torch")

    rows = len(step.slot_mapping)
    even = "cos_sin must have an even number of columns, at most head_dim 32"
    refused(ValueError, even, cos_sin=torch.zeros(rows, 15))
    refused(ValueError, even, cos_sin=torch.zeros(rows, 34))
    every_row = f"cos_sin must be [T, rotary_dim] = [{rows}, *]; got [300, 16]"
    refused(ValueError, every_row, cos_sin=torch.zeros(300, 16))
    refused(ValueError, "k_weight must be [head_dim] = [32]; got [31]", k_weight=torch.zeros(31))
    with pytest.raises(ValueError, match="q_out must not be q itself"):
        run(step, pages, "torch", q_out=step.given.q)
    with pytest.raises(TypeError, match=r"q_out must be torch\.float32"):
        run(step, pages, "torch", q_out=step.given.q.half())
    assert all(page.isnan().all() for page in pages)
