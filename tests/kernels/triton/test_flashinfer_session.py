"""A session with FlashInfer for prefill attention: tried before it serves, and given up for ours.

In FlashInfer's place stands the oracle, right or with a fault; the rest of a step is Triton's.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from m3_kernels.sparse_attention import SPARSE_ATTENTION, PrefillAttention, SparseAttention
from m3_kernels.testing.cases import Case
from m3_plugin.attention import assembly
from m3_plugin.attention import self_test as self_test_module
from m3_plugin.attention import session as session_module
from m3_plugin.attention.backends import KernelChoice, NoKernelError
from m3_plugin.attention.self_test import Finding, self_test, verify_case
from m3_plugin.attention.workspace import LayerShape
from m3_plugin.model.config import MSAConfig

CPU = torch.device("cpu")
RULES = MSAConfig(
    num_index_heads=1,
    index_dim=16,
    block_size=16,
    topk_blocks=2,
    num_init_blocks=0,
    num_local_blocks=1,
)
SHAPE = LayerShape(
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rotary_dim=8,
    dtype=torch.float16,
    cache_dtype=torch.float16,
    index_dtype=torch.float16,
)
TRITON = KernelChoice("triton", "best available on cuda")
WITH = dataclasses.replace(TRITON, prefill="flashinfer")


def oracle(call: SparseAttention) -> None:
    SPARSE_ATTENTION.run(call, backend="reference")


def sees_one_key_too_many(call: SparseAttention) -> None:
    seq_lens = call.step.seq_lens + 1
    oracle(dataclasses.replace(call, step=dataclasses.replace(call.step, seq_lens=seq_lens)))


def drops_the_last_block(call: SparseAttention) -> None:
    ids = call.block_ids.clone()
    ids[..., -1] = -1
    oracle(dataclasses.replace(call, block_ids=ids))


def depends_on_the_chunk(call: SparseAttention) -> None:
    """Right to rounding, with another bit in the third row of whatever is computed together."""
    oracle(call)
    bounds = call.step.cu_seqlens_q
    third = bounds[:-1][bounds.diff() > 8] + 2
    call.out.view(torch.int16)[third, 0, 0] ^= 1


def is_not_compiled(call: SparseAttention) -> None:
    raise ImportError("no module named cutlass")


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[PrefillAttention], list[int]]:
    """Put a function where FlashInfer's is; the rows of its calls are noted in the result."""

    def put(prefill: PrefillAttention) -> list[int]:
        calls: list[int] = []

        def noted(call: SparseAttention) -> None:
            calls.append(call.q.shape[0])
            prefill(call)

        monkeypatch.setattr(session_module, "flashinfer_prefill", noted)
        monkeypatch.setattr(assembly, "flashinfer_refusal", lambda **_: None)
        monkeypatch.setattr(assembly, "arch_of", lambda device: 120)
        return calls

    return put


@pytest.fixture(autouse=True)
def _nothing_tried() -> Iterator[None]:
    """The self-test runs once per process; here its kernels change from test to test."""
    assembly.try_kernels.cache_clear()
    yield
    assembly.try_kernels.cache_clear()


@pytest.fixture
def one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the self-test."""
    monkeypatch.setattr(self_test_module, "PREFILL_PAGES", ("packed-slots",))


def the_self_test() -> tuple[Finding, ...]:
    return self_test(
        RULES,
        kernels=dataclasses.replace(WITH, forced=True),
        num_q_heads=SHAPE.num_q_heads,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        rotary_dim=SHAPE.rotary_dim,
        dtype=SHAPE.dtype,
        device=CPU,
    )


@pytest.mark.parametrize(
    "layouts",
    [("packed-slots",), pytest.param(self_test_module.PREFILL_PAGES, marks=pytest.mark.extended)],
    ids=["one-layout", "all-layouts"],
)
def test_it_serves_after_its_test(
    layouts: tuple[str, ...], standing_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test_module, "PREFILL_PAGES", layouts)
    calls = standing_in(oracle)
    findings: list[Finding] = []
    judge = self_test_module.require_right

    def noted(found: tuple[Finding, ...], **kw: Any) -> None:
        findings.extend(found)
        judge(found, **kw)

    monkeypatch.setattr(self_test_module, "require_right", noted)
    choice = assembly.with_flashinfer(RULES, SHAPE, kernels=TRITON, device=CPU)
    assert choice.describe() == ("triton (best available on cuda; prefill attention by flashinfer)")
    assert not choice.forced
    assert {f.phase for f in findings} == {"prefill", "mixed"}
    assert {f.case.split(" on ")[1] for f in findings} == {f"{pages} pages" for pages in layouts}
    quantities = {"queries", "cache", "selection", "attention", "run", "repeats", "chunks"}
    assert {f.quantity for f in findings} == quantities
    # two steps: on given queries, part by part, in one, repeated, and the longest request in
    # another chunk
    assert len(calls) == len(layouts) * 2 * 5


@pytest.mark.parametrize(
    ("wrong", "quantities"),
    [
        (sees_one_key_too_many, {"attention"}),
        (depends_on_the_chunk, {"chunks"}),
    ],
)
@pytest.mark.usefixtures("one_layout")
@pytest.mark.extended
def test_faults_are_found(wrong: PrefillAttention, quantities: set[str], standing_in: Any) -> None:
    standing_in(wrong)
    assert {f.quantity for f in the_self_test() if not f.ok} == quantities


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            drops_the_last_block,
            r"KernelsAreWrongError: kernel family 'triton with flashinfer' .*error",
        ),
        (is_not_compiled, "ImportError: no module named cutlass"),
    ],
)
@pytest.mark.usefixtures("one_layout")
def test_whatever_goes_wrong_ours_serves(
    wrong: PrefillAttention,
    reason: str,
    standing_in: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    standing_in(wrong)
    with caplog.at_level(logging.WARNING):
        choice = assembly.with_flashinfer(RULES, SHAPE, kernels=TRITON, device=CPU)
    assert choice.prefill is None
    assert choice.describe().startswith(
        "triton (best available on cuda; flashinfer refused: its test failed: "
    )
    assert "flashinfer is not used: its test failed" in caplog.text
    assert re.search(reason, choice.describe())


def test_who_names_it_gets_it_or_nothing(standing_in: Any) -> None:
    standing_in(is_not_compiled)
    forced = dataclasses.replace(WITH, forced=True)
    with pytest.raises(NoKernelError, match=r"cannot run here: .* no module named cutlass"):
        assembly.with_flashinfer(RULES, SHAPE, kernels=forced, device=CPU)


def test_a_test_that_did_not_try_it_proves_nothing(
    standing_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = standing_in(oracle)
    monkeypatch.setattr(self_test_module, "PREFILL_PAGES", ("planes",))
    choice = assembly.with_flashinfer(RULES, SHAPE, kernels=TRITON, device=CPU)
    assert calls == []
    assert choice.prefill is None
    assert "side by side in one tensor" in choice.describe()


def test_who_names_triton_gets_triton(standing_in: Any) -> None:
    calls = standing_in(oracle)
    forced = dataclasses.replace(TRITON, forced=True)
    assert assembly.with_flashinfer(RULES, SHAPE, kernels=forced, device=CPU) is forced
    assert calls == []


def test_a_limit_is_told_without_a_test(standing_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = standing_in(oracle)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(assembly, "flashinfer_refusal", lambda **kw: asked.append(kw) or "no")
    choice = assembly.with_flashinfer(RULES, SHAPE, kernels=TRITON, device=CPU)
    assert choice.refused == (("flashinfer", "no"),)
    assert calls == []
    assert asked == [
        {
            "arch": 120,
            "dtype": torch.float16,
            "kv_dtype": torch.float16,
            "num_q_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "page_size": 16,
            "topk": 2,
        }
    ]


STEP = Case("step", ((60, 9), (40, 1)), num_q_heads=4, topk=2, dtype=torch.float16)


def test_pages_it_cannot_read_are_ours(
    standing_in: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = standing_in(oracle)
    sessions: list[Any] = []
    make = session_module.MSASession.__init__

    def kept(self: Any, *args: Any, **kw: Any) -> None:
        make(self, *args, **kw)
        sessions.append(self)

    monkeypatch.setattr(session_module.MSASession, "__init__", kept)
    with caplog.at_level(logging.WARNING):
        findings = verify_case(STEP, kernels=WITH, device=CPU, repeats=1)
    assert all(finding.ok for finding in findings)
    assert calls == []
    assert sessions[0].kernels.prefill is None
    assert caplog.text.count("flashinfer refused: K and V must each be contiguous") == 1
    with pytest.raises(NoKernelError, match="flashinfer cannot run here: K and V must each"):
        verify_case(STEP, kernels=dataclasses.replace(WITH, forced=True), device=CPU)


def test_captures_are_ours(standing_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = standing_in(oracle)
    monkeypatch.setattr(session_module, "_is_captured", lambda device: True)
    packed = dataclasses.replace(STEP, pages="packed-heads")
    findings = verify_case(packed, kernels=WITH, device=CPU)
    assert all(finding.ok for finding in findings)
    assert calls == []
