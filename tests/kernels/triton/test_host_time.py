"""What the host does for a step it does once: a second step looks no configuration up anew."""

from __future__ import annotations

import dataclasses

import torch

from m3_kernels import tuning
from m3_kernels.testing.cases import Case
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.self_test import verify_case

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
