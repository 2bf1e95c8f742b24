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


def test_eight_bits_as_cache_store_writes_them() -> None:
    """Both ops write through the same functions, and round to the activations' dtype before."""
    half = STEP.with_dtype(torch.float16)
    step = step_of(half)
    wide = results(step, "triton")
    kept = step.slot_mapping >= 0
    scale = {"k_scale": torch.tensor([0.5, 3.0]), "v_scale": torch.tensor([2.0])}
    stores = []
    for fused in (True, False):
        shapes = [page.shape for page in empty_pages(half, step.inputs.k_pages.shape[0])]
        k_pages, v_pages = (torch.zeros(shape).to(torch.float8_e5m2) for shape in shapes[:2])
        index_pages = torch.full(shapes[2], 99, dtype=torch.int8)
        scales = torch.full(shapes[2][:2], torch.nan)
        pages = (k_pages, v_pages, index_pages)
        if fused:
            run(step, pages, "triton", index_k_scales=scales, **scale)
        else:
            cache_store(
                stored_rows(wide["k"], step),
                step.given.v[kept],
                stored_rows(wide["index_k"], step),
                *pages,
                slot_mapping=step.slot_mapping[kept],
                index_k_scales=scales,
                backend="triton",
                **scale,
            )
        stores.append((k_pages.float(), v_pages.float(), index_pages, scales))
    for a, b in zip(*stores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert stores[0][0].any()
    assert stores[0][1].any()
    assert (stores[0][2] != 99).any()
