"""Running `norm_rope_store` on cases, and how far its results may be from float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.norm_rope_store import norm_rope_store
from m3_kernels.testing.cases import Case, Inputs, build, empty_pages
from m3_kernels.testing.projections import (
    EPS,
    Projections,
    largest_rounding,
    normed_and_rotated,
    project,
)


@dataclass(frozen=True)
class Step:
    """A case, its rows as projections give them, and where they are stored."""

    inputs: Inputs
    given: Projections
    slot_mapping: Tensor


def step_of(case: Case, *, table_dtype: torch.dtype = torch.float32) -> Step:
    """The rows of a case; angles in memory whose neighbours are NaN."""
    inputs = build(case)
    given = project(inputs)
    table = torch.full((len(given.cos_sin), case.rotary_dim + 3), torch.nan, dtype=table_dtype)
    table[:, : case.rotary_dim] = given.cos_sin
    given = dataclasses.replace(given, cos_sin=table[:, : case.rotary_dim])
    return Step(inputs, given, inputs.slot_mapping)


def rows_of(step: Step, first: int, last: int) -> Step:
    """Some of the rows, alone."""
    names = ("q", "k", "v", "index_q", "index_k", "cos_sin")
    cut = {name: getattr(step.given, name)[first:last] for name in names}
    given = dataclasses.replace(step.given, **cut)
    return dataclasses.replace(step, given=given, slot_mapping=step.slot_mapping[first:last])


def run(
    step: Step, pages: tuple[Tensor, ...], backend: Backend, **options: Any
) -> tuple[Tensor, Tensor]:
    return norm_rope_store(
        *step.given.rows,
        *pages,
        **step.given.weights,
        eps=EPS,
        cos_sin=step.given.cos_sin,
        slot_mapping=step.slot_mapping,
        backend=backend,
        **options,
    )


def results(step: Step, backend: Backend) -> dict[str, Tensor]:
    """Queries, and keys as they lie in pages that held NaN, by the names of the arguments."""
    pages = empty_pages(step.inputs.case, step.inputs.k_pages.shape[0])
    q, index_q = run(step, pages, backend)
    return {"q": q, "index_q": index_q, "k": pages[0], "v": pages[1], "index_k": pages[2]}


def stored_rows(pages: Tensor, step: Step) -> Tensor:
    """What lies in the slots of the step's tokens, negative slots left out."""
    by_slot = pages.transpose(1, 2) if pages.dim() == 4 else pages
    slots = step.slot_mapping[step.slot_mapping >= 0]
    return by_slot[slots // by_slot.shape[1], slots % by_slot.shape[1]]


def assert_close(found: dict[str, Tensor], step: Step) -> None:
    """Queries and keys as near to float64 as their dtype allows, and nothing else written."""
    wanted = normed_and_rotated(step.given)
    kept = step.slot_mapping >= 0
    got = {"q": found["q"], "index_q": found["index_q"]}
    for name in ("k", "index_k"):
        got[name] = stored_rows(found[name], step)
        wanted[name] = wanted[name][kept]
    for name, values in got.items():
        allowed = largest_rounding(wanted[name], values.dtype)
        assert ((values.double() - wanted[name]).abs() <= allowed).all(), name
    assert torch.equal(stored_rows(found["v"], step), step.given.v[kept])
    for name in ("k", "v", "index_k"):
        written = found[name].isfinite().sum()
        assert written == stored_rows(found[name], step).numel()


STEP = Case("step", ((30, 1), (0, 5), (17, 3)), padding_rows=2)
ODD = dataclasses.replace(STEP, name="odd", head_dim=40, num_q_heads=6, rotary_dim=20)
# (case, dtype of the angles' cosines and sines); sizes that are no powers of two among them
GIVEN = (
    (STEP, torch.float32),
    (dataclasses.replace(STEP, name="all-channels", index_dim=48, rotary_dim=32), torch.float32),
    (ODD, torch.float32),
    (dataclasses.replace(STEP, name="no-rope", rotary_dim=0), torch.float32),
    (STEP.with_dtype(torch.float16), torch.float16),
)
