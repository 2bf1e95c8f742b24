"""The Triton kernel of `norm_rope_store`: its maths, its writes, and equal bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from m3_kernels.cache_store import cache_store
from m3_kernels.testing.cases import Case, empty_pages
from tests.kernels.norm_rope import (
    GIVEN,
    STEP,
    assert_close,
    results,
    rows_of,
    run,
    step_of,
    stored_rows,
)


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given[0].name)
def test_equals_exact_arithmetic(given: tuple[Case, torch.dtype]) -> None:
    case, table_dtype = given
    step = step_of(case, table_dtype=table_dtype)
    assert_close(results(step, "triton"), step)


def test_more_heads_than_a_program_takes() -> None:
    case = dataclasses.replace(STEP, num_q_heads=36, num_kv_heads=18, requests=((3, 2),))
    step = step_of(case)
    assert_close(results(step, "triton"), step)


def test_a_row_s_bits_do_not_depend_on_the_others() -> None:
    step = step_of(STEP)
    together = results(step, "triton")
    alone = rows_of(step, 4, 5)
    found = results(alone, "triton")
    assert torch.equal(found["q"][0], together["q"][4])
    assert torch.equal(found["index_q"][0], together["index_q"][4])
    for name in ("k", "index_k"):
        own = stored_rows(found[name], alone)
        assert torch.equal(own, stored_rows(together[name], alone))


def test_int8_index_keys_as_cache_store_writes_them() -> None:
    """Both ops write through the same functions, and round to the activations' dtype before."""
    half = STEP.with_dtype(torch.float16)
    step = step_of(half)
    inputs = step.inputs
    wide = results(step, "triton")
    kept = inputs.slot_mapping >= 0
    stores = []
    for fused in (True, False):
        k_pages, v_pages, wide_pages = empty_pages(inputs.case, inputs.k_pages.shape[0])
        pages = torch.full(wide_pages.shape, 99, dtype=torch.int8)
        scales = torch.full(wide_pages.shape[:2], torch.nan)
        if fused:
            run(step, (k_pages, v_pages, pages), "triton", index_k_scales=scales)
        else:
            cache_store(
                stored_rows(wide["k"], step),
                step.given.v[kept],
                stored_rows(wide["index_k"], step),
                k_pages,
                v_pages,
                pages,
                slot_mapping=inputs.slot_mapping[kept],
                index_k_scales=scales,
                backend="triton",
            )
        stores.append((k_pages, v_pages, pages, scales))
    for a, b in zip(*stores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert (stores[0][2] != 99).any()
