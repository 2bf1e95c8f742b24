"""Inputs of `norm_rope_store`, and the same results in float64 from a formula of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.norm_rope_store import norm_rope_store
from m3_kernels.testing.cases import Case, Inputs, build, empty_pages

EPS = 1e-5
TABLE = 300


@dataclass(frozen=True)
class Projections:
    """Rows of a step as projections give them, and what norm and RoPE need.

    Attributes
    ----------
    cos_sin, positions, weights : as in the op's contract
    """

    inputs: Inputs
    cos_sin: Tensor
    positions: Tensor
    weights: dict[str, Tensor]


def projections(case: Case, *, rotary_dim: int, table_dtype: torch.dtype) -> Projections:
    """Inputs of a case whose heads have unequal sizes, at positions that are not in order."""
    inputs = build(case)
    random = torch.Generator().manual_seed(case.seed)
    rows = inputs.q.shape[0]
    frequencies = 100.0 ** -(torch.arange(rotary_dim // 2) / max(rotary_dim // 2, 1))
    angles = torch.arange(TABLE)[:, None] * frequencies
    table = torch.full((TABLE, rotary_dim + 3), torch.nan, dtype=table_dtype)
    table[:, :rotary_dim] = torch.cat([angles.cos(), angles.sin()], dim=1).to(table_dtype)
    sizes = {"q": case.head_dim, "k": case.head_dim}
    sizes |= {"index_q": case.index_dim, "index_k": case.index_dim}
    weights = {
        f"{name}_weight": torch.randn(size, generator=random).to(case.dtype)
        for name, size in sizes.items()
    }
    for tensor in (inputs.q, inputs.k, inputs.index_q):
        tensor *= torch.rand(tensor.shape[1], 1, generator=random).to(case.dtype) * 3
    return Projections(
        inputs=inputs,
        cos_sin=table[:, :rotary_dim],
        positions=torch.randint(0, TABLE, (rows,), generator=random),
        weights=weights,
    )


def run(
    given: Projections, pages: tuple[Tensor, ...], backend: Backend, **options: Any
) -> tuple[Tensor, Tensor]:
    inputs = given.inputs
    return norm_rope_store(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.index_q,
        inputs.index_k,
        *pages,
        **given.weights,
        eps=EPS,
        cos_sin=given.cos_sin,
        positions=given.positions,
        slot_mapping=inputs.slot_mapping,
        backend=backend,
        **options,
    )


def results(given: Projections, backend: Backend) -> dict[str, Tensor]:
    """Queries, and keys as they lie in pages that held NaN, by the names of the arguments."""
    pages = empty_pages(given.inputs.case, given.inputs.k_pages.shape[0])
    q, index_q = run(given, pages, backend)
    return {"q": q, "index_q": index_q, "k": pages[0], "v": pages[1], "index_k": pages[2]}


def exact(given: Projections) -> dict[str, Tensor]:
    """The queries and keys of every row in float64, as complex numbers turn."""
    found = {}
    half = given.cos_sin.shape[1] // 2
    table = given.cos_sin.double()
    turns = torch.complex(table[:, :half], table[:, half:])[given.positions]
    for name in ("q", "k", "index_q", "index_k"):
        x = getattr(given.inputs, name).double()
        norm = (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS) ** -0.5
        x = x * norm * (given.weights[f"{name}_weight"].double() + 1)
        here = turns.view(len(turns), *[1] * (x.dim() - 2), half)
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * here
        found[name] = torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)
    return found


def stored_rows(pages: Tensor, inputs: Inputs) -> Tensor:
    """What lies in the slots of the step's tokens, negative slots left out."""
    by_slot = pages.transpose(1, 2) if pages.dim() == 4 else pages
    slots = inputs.slot_mapping[inputs.slot_mapping >= 0]
    return by_slot[slots // by_slot.shape[1], slots % by_slot.shape[1]]


def assert_close(found: dict[str, Tensor], given: Projections) -> None:
    """Queries and keys within three roundings of float64, and nothing else written."""
    wanted = exact(given)
    inputs = given.inputs
    kept = inputs.slot_mapping >= 0
    rounding = 3 * torch.finfo(inputs.case.dtype).eps
    for name in ("q", "index_q"):
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=rounding, atol=rounding)
    for name in ("k", "index_k"):
        got = stored_rows(found[name], inputs).double()
        torch.testing.assert_close(got, wanted[name][kept], rtol=rounding, atol=rounding)
    assert torch.equal(stored_rows(found["v"], inputs), inputs.v[kept])
    for name in ("k", "v", "index_k"):
        written = found[name].isfinite().sum()
        assert written == stored_rows(found[name], inputs).numel()


STEP = Case("step", ((30, 1), (0, 5), (17, 3)), padding_rows=2)
# (case, rotary_dim, dtype of the table); sizes that are no powers of two among them
GIVEN = (
    (STEP, 16, torch.float32),
    (dataclasses.replace(STEP, name="all-channels", index_dim=48), 32, torch.float32),
    (dataclasses.replace(STEP, name="odd", head_dim=40, num_q_heads=6), 20, torch.float32),
    (dataclasses.replace(STEP, name="no-turn"), 0, torch.float32),
    (STEP.with_dtype(torch.float16), 16, torch.float16),
)
