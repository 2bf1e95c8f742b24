"""A session on fp8 pages: scales reach the store and the attention, and are those of each head."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from m3_kernels.norm_rope_store import NORM_ROPE_STORE, NormRopeStore
from m3_kernels.sparse_attention import SparseAttention
from m3_kernels.testing.cases import Case
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.self_test import Finding, verify_case
from tests.plugin.broken_ops import Run, break_op

# One row per kind of kernel, beyond the two blocks a row may read. The interpreter stands for a
# chip of capability 8.0, which reads e5m2 only.
CASE = Case(
    "fp8",
    ((70, 1), (37, 9)),
    num_q_heads=4,
    page_size=16,
    topk=2,
    dtype=torch.float16,
    kv_dtype=torch.float8_e5m2,
)


@pytest.fixture(autouse=True)
def _exact_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session stores by the oracle: the interpreter loses the carry when it rounds to fp8."""

    def exact(right: Run, call: NormRopeStore) -> None:
        NORM_ROPE_STORE.run(call, backend="reference")

    break_op(monkeypatch, "norm_rope_store", exact)


def found(case: Case = CASE) -> dict[str, Finding]:
    """By quantity."""
    kernels = KernelChoice("triton", "test")
    findings = verify_case(case, kernels=kernels, device=torch.device("cpu"))
    return {finding.quantity: finding for finding in findings}


def test_scales_of_each_head_and_of_the_tensor() -> None:
    """Keys have a scale per head, values one; `run` stores what it then reads."""
    findings = found()
    assert {name: finding.faults for name, finding in findings.items()} == {
        "queries": (),
        "cache": (),
        "selection": (),
        "attention": (),
        "run": (),
    }


@pytest.mark.parametrize(
    ("op", "scale", "wrong"),
    [
        ("norm_rope_store", "k_scale", "cache"),
        ("norm_rope_store", "v_scale", "cache"),
        ("sparse_attention", "k_scale", "attention"),
        ("sparse_attention", "v_scale", "attention"),
    ],
)
def test_a_lost_scale_is_seen(
    monkeypatch: pytest.MonkeyPatch, op: str, scale: str, wrong: str
) -> None:

    def without(right: Run, call: NormRopeStore | SparseAttention) -> None:
        if isinstance(call, SparseAttention):
            return right(replace(call, kv=replace(call.kv, **{scale: None})))
        caches = replace(call.stored.caches, **{scale: None})
        return right(replace(call, stored=replace(call.stored, caches=caches)))

    break_op(monkeypatch, op, without)
    case = dataclasses.replace(CASE, requests=((70, 1),))
    assert not found(case)[wrong].ok
