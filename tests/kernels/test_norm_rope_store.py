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
    STEP,
    TABLE,
    assert_close,
    projections,
    results,
    run,
    stored_rows,
)

EVERY_BACKEND: tuple[Backend, ...] = ("native", "torch", "reference")
BF16 = (STEP.with_dtype(torch.bfloat16), 16, torch.float32)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("given", [*GIVEN, BF16], ids=lambda given: given[0].name)
def test_equals_exact_arithmetic(given: tuple[Case, int, torch.dtype], backend: Backend) -> None:
    case, rotary_dim, table_dtype = given
    step = projections(case, rotary_dim=rotary_dim, table_dtype=table_dtype)
    assert_close(results(step, backend), step)


def test_a_zero_row_stays_zero() -> None:
    step = projections(STEP, rotary_dim=16, table_dtype=torch.float32)
    step.inputs.q[0] = 0
    assert (results(step, "torch")["q"][0] == 0).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_narrower_cache_gets_what_the_activations_dtype_holds(backend: Backend) -> None:
    """As if a host had normalised in its dtype and then stored."""
    step = projections(STEP, rotary_dim=16, table_dtype=torch.float32)
    wide = results(step, backend)
    pages = tuple(
        page.to(torch.float16)
        for page in empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])
    )
    run(step, pages, backend)
    got = stored_rows(pages[0], step.inputs)
    assert torch.equal(got, stored_rows(wide["k"], step.inputs).half())


def test_eight_bits_as_cache_store_writes_them() -> None:
    step = projections(STEP, rotary_dim=16, table_dtype=torch.float32)
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
        stored_rows(plain["k"], inputs),
        inputs.v[slots],
        stored_rows(plain["index_k"], inputs),
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
@pytest.mark.parametrize("position", [-1, TABLE])
def test_positions_outside_the_table_write_nothing(position: int, backend: Backend) -> None:
    step = projections(STEP, rotary_dim=16, table_dtype=torch.float32)
    step.positions[-1] = position
    pages = empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])
    with pytest.raises(IndexError, match=rf"positions must be in 0\.\.{TABLE - 1}"):
        run(step, pages, backend)
    assert all(page.isnan().all() for page in pages)


def test_refusals_name_the_argument() -> None:
    step = projections(STEP, rotary_dim=16, table_dtype=torch.float32)
    pages = empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])

    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=re.escape(words)):
            run(dataclasses.replace(step, **changes), pages, "torch")

    even = "cos_sin must have an even number of columns, at most head_dim 32"
    refused(ValueError, even, cos_sin=torch.zeros(TABLE, 15))
    refused(ValueError, even, cos_sin=torch.zeros(TABLE, 34))
    refused(TypeError, "positions must be torch.int64", positions=step.positions.int())
    weights = {**step.weights, "k_weight": torch.zeros(31)}
    refused(ValueError, "k_weight must be [head_dim] = [32]; got [31]", weights=weights)
    with pytest.raises(ValueError, match="q_out must not be q itself"):
        run(step, pages, "torch", q_out=step.inputs.q)
    with pytest.raises(TypeError, match=r"q_out must be torch\.float32"):
        run(step, pages, "torch", q_out=step.inputs.q.half())
    assert all(page.isnan().all() for page in pages)
