"""The self-test and the case runner: silent about right kernels, loud about wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.index_topk import IndexTopk
from m3_kernels.norm_rope_store import NormRopeStore
from m3_kernels.sparse_attention import SparseAttention
from m3_kernels.testing.cases import Case, all_cases
from m3_plugin.attention import dense as dense_module
from m3_plugin.attention.backends import KernelChoice, choose_kernels
from m3_plugin.attention.self_test import (
    Finding,
    KernelsAreWrongError,
    phase_of,
    require_right,
    self_test,
    verify_case,
)
from m3_plugin.model.config import MSAConfig
from tests.plugin.broken_ops import Run, break_op

CPU = torch.device("cpu")
# Production's rules on small heads, so that a self-test takes a fraction of a second.
RULES = MSAConfig(
    num_index_heads=2,
    index_dim=32,
    block_size=16,
    topk_blocks=4,
    num_init_blocks=0,
    num_local_blocks=1,
)


def found(kernels: KernelChoice | None = None, **changes: Any) -> tuple[Finding, ...]:
    arguments: dict[str, Any] = {
        "num_q_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "decode_rows": 2,
        "dtype": torch.float16,
    }
    return self_test(
        RULES, kernels=kernels or choose_kernels("cpu"), device=CPU, **(arguments | changes)
    )


def case_named(name: str) -> Case:
    return next(case for case in all_cases() if case.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["native", "torch"])
def test_right_kernels_pass(family: Any, dtype: torch.dtype) -> None:
    findings = found(choose_kernels("cpu", family), dtype=dtype)
    assert [f for f in findings if not f.ok] == []
    assert {f.phase for f in findings} == {"decode", "verify", "prefill"}
    quantities = {"queries", "cache", "selection", "attention", "dense", "run", "repeats"}
    assert {f.quantity for f in findings} == quantities
    require_right(findings, kernels=choose_kernels("cpu", family), device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, PLANES_DTYPE])
@pytest.mark.parametrize("family", ["native", "torch"])
def test_index_keys_with_scales_are_tried_as_such(family: Any, dtype: torch.dtype) -> None:
    findings = found(choose_kernels("cpu", family), index_dtype=dtype)
    assert [f for f in findings if not f.ok] == []


def test_a_neighbours_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(right: Run, call: IndexTopk) -> None:
        scales = call.keys.index_k_scales
        assert scales is not None
        right(replace(call, keys=replace(call.keys, index_k_scales=scales.roll(1, dims=1))))

    break_op(monkeypatch, "index_topk", wrong)
    findings = found(index_dtype=torch.int8)
    assert "selection" in {f.quantity for f in findings if not f.ok}


def test_it_does_not_notice_the_host_building_a_model_around_it() -> None:
    """vLLM builds models under a device context and with bfloat16 as the default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            findings = found()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(f.ok for f in findings)


def wrong_scale(right: Run, call: SparseAttention) -> None:
    right(replace(call, scale=call.scale * 1.05))


def test_wrong_dense_layers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dense_module.dense_attention

    def wrong_scale_of_dense(*args: Any, scale: float, **kw: Any) -> Tensor:
        return right(*args, scale=scale * 1.05, **kw)

    monkeypatch.setattr(dense_module, "dense_attention", wrong_scale_of_dense)
    assert {f.quantity for f in found() if not f.ok} == {"dense"}


def sees_one_key_too_many(right: Run, call: SparseAttention) -> None:
    right(replace(call, step=replace(call.step, seq_lens=call.step.seq_lens + 1)))


def drops_the_merge(right: Run, call: SparseAttention) -> None:
    """Only the first half of the chosen blocks, as if a split were never merged."""
    ids = call.block_ids.clone()
    ids[..., ids.shape[-1] // 2 :] = -1
    right(replace(call, block_ids=ids))


def worst_blocks(right: Run, call: IndexTopk) -> None:
    right(replace(call, index_q=-call.index_q))


def forgets_the_local_block(right: Run, call: IndexTopk) -> None:
    right(replace(call, num_local_blocks=0))


def descending_ids(right: Run, call: IndexTopk) -> None:
    right(call)
    call.out.copy_(call.out.flip(-1))


def stored_at(call: NormRopeStore, slots: Tensor) -> NormRopeStore:
    return replace(call, stored=replace(call.stored, slot_mapping=slots))


def off_by_one_slot(right: Run, call: NormRopeStore) -> None:
    right(stored_at(call, (call.stored.slot_mapping - 1).clamp_min(-1)))


def stores_nothing(right: Run, call: NormRopeStore) -> None:
    right(stored_at(call, torch.full_like(call.stored.slot_mapping, -1)))


def swaps_two(right: Run, call: NormRopeStore) -> None:
    norms = call.norms
    right(replace(call, norms=replace(norms, k=norms.index_k, index_k=norms.k)))


def rotates_the_other_way(right: Run, call: NormRopeStore) -> None:
    cos, sin = call.cos_sin.chunk(2, dim=-1)
    right(replace(call, cos_sin=torch.cat((cos, -sin), dim=-1)))


def rotates_by_the_neighbours_angle(right: Run, call: NormRopeStore) -> None:
    right(replace(call, cos_sin=call.cos_sin.roll(1, 0)))


def multiplies_by_w_alone(right: Run, call: NormRopeStore) -> None:
    right(replace(call, norms=replace(call.norms, index_q=call.norms.index_q - 1)))


@pytest.mark.parametrize(
    ("op", "wrong", "quantity"),
    [
        ("sparse_attention", wrong_scale, "attention"),
        ("sparse_attention", sees_one_key_too_many, "attention"),
        ("sparse_attention", drops_the_merge, "attention"),
        ("index_topk", worst_blocks, "selection"),
        ("index_topk", forgets_the_local_block, "selection"),
        ("index_topk", descending_ids, "selection"),
        ("norm_rope_store", off_by_one_slot, "cache"),
        ("norm_rope_store", stores_nothing, "cache"),
        ("norm_rope_store", swaps_two, "cache"),
        ("norm_rope_store", rotates_the_other_way, "queries"),
        ("norm_rope_store", rotates_by_the_neighbours_angle, "cache"),
        ("norm_rope_store", multiplies_by_w_alone, "queries"),
    ],
)
def test_wrong_kernels_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, op: str, wrong: Callable[..., Any], quantity: str
) -> None:
    break_op(monkeypatch, op, wrong)
    findings = found()
    assert quantity in {f.quantity for f in findings if not f.ok}
    with pytest.raises(KernelsAreWrongError, match=f"on NVIDIA A100 .*{quantity}: "):
        require_right(findings, kernels=choose_kernels("cpu"), device="NVIDIA A100")


def test_unsteady_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run right to rounding, yet not the same bits."""
    calls = 0

    def unsteady(right: Run, call: SparseAttention) -> None:
        nonlocal calls
        calls += 1
        right(call)
        if calls == 4:
            call.out.add_(call.out * 2**-10)

    break_op(monkeypatch, "sparse_attention", unsteady)
    findings = verify_case(
        case_named("verify").with_dtype(torch.float16),
        kernels=choose_kernels("cpu"),
        device=CPU,
        repeats=3,
    )
    assert [(f.quantity, f.faults) for f in findings if not f.ok] == [
        ("repeats", ("1 of 3 runs gave other bits",))
    ]


def test_writing_beside_the_pages_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spills(right: Run, call: NormRopeStore) -> None:
        right(call)
        index_pages = call.stored.caches.index_k_pages
        index_pages.as_strided((1,), (1,), index_pages.shape[-1]).fill_(0)

    break_op(monkeypatch, "norm_rope_store", spills)
    findings = verify_case(case_named("mixed"), kernels=choose_kernels("cpu"), device=CPU)
    assert ("cache", ("index_k_pages holds other bytes",)) in {
        (f.quantity, f.faults) for f in findings
    }


def test_phases() -> None:
    phases = {case.name: phase_of(case) for case in all_cases()}
    assert phases["decode-ragged"] == "decode"
    assert phases["verify"] == "verify"
    assert phases["prefill"] == "prefill"
    assert phases["mixed"] == "mixed"
