"""What the host does for a step it does once: a second step looks no configuration up anew."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from m3_kernels import tuning
from m3_kernels.paged import MSACaches
from m3_kernels.testing.cases import Case, build
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.self_test import session_for, verify_case

CASE = Case("mixed", ((70, 1), (37, 9)), num_q_heads=4, page_size=16, topk=2, dtype=torch.float16)


def misses() -> dict[str, int]:
    """Of everything that is looked up by name while kernels are launched."""
    caches = (tuning._config, tuning._rows, tuning.triton_release, tuning._arch_of_gpu)
    return {cache.__name__: cache.cache_info().misses for cache in caches}


def run(case: Case, *, max_seq_len: int) -> None:
    """A step of the longest request a host announces."""
    findings = verify_case(
        case,
        kernels=KernelChoice("triton", "test"),
        device=torch.device("cpu"),
        max_seq_len=max_seq_len,
    )
    assert all(finding.ok for finding in findings)


def test_a_second_step_looks_up_nothing_anew() -> None:
    """Plan, store, scores, choice and attention, of prompts and of decoding, with other lengths."""
    tuning._config.cache_clear()
    run(CASE, max_seq_len=128)
    first = misses()
    assert first["_config"] > 5
    run(dataclasses.replace(CASE, requests=((33, 1), (50, 12))), max_seq_len=100)
    assert misses() == first


def test_a_second_step_makes_no_descriptor_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """They describe a layer's pages, which stay where a host has bound them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from m3_kernels import triton_shared

    inputs = build(CASE)
    caches = MSACaches(inputs.k_pages, inputs.v_pages, inputs.index_k_pages)
    monkeypatch.setattr(tuning, "INTERPRETER_ARCH", 90)
    choice = KernelChoice("triton", "test")
    session = session_for(CASE, kernels=choice, device=torch.device("cpu"))
    plan = session.plan(
        MSABatch(**inputs.batch, slot_mapping=inputs.slot_mapping, max_query_len=9, max_seq_len=71)
    )
    made: list[object] = []

    class Counted(TensorDescriptor):
        def __post_init__(self) -> None:
            made.append(self)
            super().__post_init__()

    monkeypatch.setattr(triton_shared, "TensorDescriptor", Counted)

    def step() -> int:
        ids = session.select(plan, inputs.index_q, caches=caches)
        session.attend(plan, inputs.q, ids, caches=caches, out=torch.empty_like(inputs.q))
        return len(made)

    first = step()
    assert first > 2
    assert step() == first
