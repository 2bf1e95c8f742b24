"""A session on fp8 pages: scales reach the store and the attention, and are those of each head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from m3_kernels.testing.cases import Case
from m3_plugin import session as session_module
from m3_plugin.backends import KernelChoice
from m3_plugin.verification import Finding, verify_case

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


def found(case: Case = CASE) -> dict[str, Finding]:
    """By quantity; "cache" is left out, because the interpreter rounds to fp8 in its own way."""
    kernels = KernelChoice("triton", "test")
    findings = verify_case(case, kernels=kernels, device=torch.device("cpu"))
    return {finding.quantity: finding for finding in findings if finding.quantity != "cache"}


def test_scales_of_each_head_and_of_the_tensor() -> None:
    """Keys have a scale per head, values one; `run` stores what it then reads."""
    findings = found()
    assert {name: finding.faults for name, finding in findings.items()} == {
        "selection": (),
        "attention": (),
        "run": (),
    }


@pytest.mark.parametrize(
    ("op", "scale", "wrong"),
    [
        ("cache_store", "k_scale", "run"),
        ("cache_store", "v_scale", "run"),
        ("sparse_attention", "k_scale", "attention"),
        ("sparse_attention", "v_scale", "attention"),
    ],
)
def test_a_lost_scale_is_seen(
    monkeypatch: pytest.MonkeyPatch, op: str, scale: str, wrong: str
) -> None:
    right = getattr(session_module, op)

    def without(*args: Any, **named: Any) -> Any:
        return right(*args, **named | {scale: None})

    monkeypatch.setattr(session_module, op, without)
    case = dataclasses.replace(CASE, requests=((70, 1),))
    assert not found(case)[wrong].ok
