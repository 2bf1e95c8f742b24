"""`m3-plugin check`: what it runs, and that wrong kernels end it with 1."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from m3_kernels.testing.cases import Case
from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.attention import self_test
from m3_plugin.attention import session as session_module
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.self_test import Finding, phase_of
from m3_plugin.cli import app
from m3_plugin.cli.check import CaseResult, _cases, _run, flashinfer_choice, prefill_cases
from tests.plugin.cli.schemas import checked

runner = CliRunner()


def run(*arguments: str) -> Any:
    return runner.invoke(app, ["check", "--device", "cpu", *arguments])


def test_report(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    result = run("--only", "mixed", "--repeats", "2", "--output", str(file))
    assert result.exit_code == 0, result.output
    assert "all right" in result.output
    report = checked("check", file.read_text())
    assert report["ok"] is True
    assert len({entry["id"] for entry in report["results"]}) == len(report["results"])
    assert {"cpu", "torch", "commit"} <= set(report["machine"])
    ran = {(r["family"], r["case"]) for r in report["results"]}
    for family in ("native", "torch"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert (family, f"mixed-{dtype}") in ran
    assert not any(family == "reference" for family, _ in ran)
    for entry in report["results"]:
        quantities = {finding["quantity"]: finding for finding in entry["findings"]}
        parts = {"queries", "cache", "selection", "attention", "dense", "run", "repeats"}
        assert set(quantities) == parts
        assert 0 < quantities["attention"]["error"] < quantities["attention"]["allowed"]


def test_json_on_stdout_is_alone_there() -> None:
    result = run("--only", "one-token", "--family", "torch", "--json")
    report = checked("check", result.stdout)
    assert {entry["family"] for entry in report["results"]} == {"torch"}


def test_wrong_kernels_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session_module.sparse_attention

    def wrong(*args: Any, scale: float, **kw: Any) -> Tensor:
        return right(*args, scale=scale * 1.1, **kw)

    monkeypatch.setattr(session_module, "sparse_attention", wrong)
    result = run("--only", "verify", "--family", "torch", "--repeats", "0")
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert "verify-float32 attention: error" in result.output
    assert "all right" not in result.output


def test_an_exception_of_a_kernel_is_wrong_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = session_module.index_topk

    def crashes(index_q: Tensor, *args: Any, **kw: Any) -> Tensor:
        if index_q.dtype == torch.bfloat16:
            raise RuntimeError("an illegal memory access was encountered")
        return right(index_q, *args, **kw)

    monkeypatch.setattr(session_module, "index_topk", crashes)
    file = tmp_path / "check.json"
    result = run("--only", "one-token", "--family", "torch", "--output", str(file))
    assert result.exit_code == 1
    assert "RuntimeError: an illegal memory access" in result.output
    entries = {entry["dtype"]: entry for entry in json.loads(file.read_text())["results"]}
    assert entries["bfloat16"]["findings"][0]["faults"]
    assert not any(finding["faults"] for finding in entries["float16"]["findings"])


def test_refusals_are_shown_and_are_wrong_only_for_what_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*args: Any, **kw: Any) -> Tensor:
        raise ValueError("page_size must be 128")

    monkeypatch.setattr(session_module, "index_topk", refuses)
    result = run("--only", "odd-sizes", "--family", "torch")
    assert result.exit_code == 0
    assert "torch refuses odd-sizes-float32: ValueError: page_size must be 128" in result.output
    assert run("--only", "m3-one-rank", "--family", "torch").exit_code == 1


def test_a_result_is_as_good_as_its_worst_finding() -> None:
    good, bad = Finding("c", "decode", "cache"), Finding("c", "decode", "run", faults=("x",))
    result = CaseResult("torch", "c", "decode", "float16", (good, bad))
    assert not result.ok
    assert CaseResult("torch", "c", "decode", "float16", (good,)).ok


def test_bfloat16_is_left_out_only_in_the_interpreter() -> None:
    def dtypes(family: str, arch: int | None) -> set[torch.dtype]:
        return {case.dtype for case in _cases(family, "one-token", arch=arch)}

    assert torch.bfloat16 not in dtypes("triton", None)
    assert dtypes("triton", 90) == {torch.float32, torch.bfloat16, torch.float16}
    assert dtypes("native", None) == dtypes("triton", 90)


def test_long_contexts_run_on_a_gpu() -> None:
    names = {case.name for case in _cases("triton", "long-", arch=90)}
    assert {"long-decode-bfloat16", "long-prefill-float16"} <= names
    assert not list(_cases("native", "long-", arch=None))


def test_chips_are_checked_with_the_caches_they_can_read() -> None:
    def caches(arch: int | None) -> set[torch.dtype]:
        cases = _cases("triton", "", arch=arch)
        return {case.kv_dtype for case in cases if case.kv_dtype is not None}

    assert caches(None) == set()
    assert caches(80) == {torch.float8_e5m2}
    assert caches(90) == {torch.float8_e5m2, torch.float8_e4m3fn}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    result = runner.invoke(app, ["check", "--device", "cuda"])
    assert result.exit_code == 3
    assert "sees no CUDA device" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--only", "no such case"], 2, "no case has 'no such case'"),
        (["--family", "cutlass"], 2, "'cutlass' does not exist on 'cpu'"),
        (["--family", "reference"], 3, "the oracle"),
    ],
)
def test_nothing_to_check_is_refused(arguments: list[str], status: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert message in result.output


def test_the_triton_kernels_run_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own, because Triton asks for its mode when it is imported."""
    file = tmp_path / "check.json"
    arguments = ["--family", "triton", "--only", "verify", "--repeats", "1", "--output", str(file)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "m3_plugin.cli", "check", "--device", "cpu", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["families"] == {"triton": "available on cpu"}
    assert {entry["dtype"] for entry in report["results"]} == {"float32", "float16"}
    for entry in report["results"]:
        found = {finding["quantity"] for finding in entry["findings"]}
        assert found == {"queries", "cache", "selection", "attention", "run", "repeats"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_gpu() -> None:
    result = runner.invoke(app, ["check", "--device", "cuda", "--repeats", "20"])
    assert result.exit_code == 0, result.output


def test_flashinfer_is_asked_for_where_there_is_none() -> None:
    result = run("--family", "flashinfer")
    assert result.exit_code == 3
    assert "flashinfer refused: it needs a GPU" in result.output


def test_flashinfer_is_checked_where_its_limits_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flashinfer_choice(90) == (
        None,
        "its msa_ops need compute capability 12.0 or 12.1, this device has 9.0",
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    choice, refusal = flashinfer_choice(120)
    assert refusal is None
    assert choice is not None
    assert (choice.name, choice.forced) == ("triton with flashinfer", True)


def test_what_is_checked_of_flashinfer_are_its_limits() -> None:
    cases = prefill_cases()
    assert len({case.name for case in cases}) == len(cases) == 36
    for case in cases:
        assert max(rows for _, rows in case.requests) > DECODE_ROWS
        assert (case.head_dim, case.page_size) == (128, 128)
        assert phase_of(case) in ("prefill", "mixed")


def test_flashinfer_is_never_compared_with_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step is Triton's, and equal to FlashInfer's to rounding only."""
    asked: list[bool] = []

    def noted(case: Case, *, graph: bool, **_: Any) -> tuple[Finding, ...]:
        asked.append(graph)
        return ()

    monkeypatch.setattr(self_test, "verify_case", noted)
    for prefill in (None, "flashinfer"):
        kernels = KernelChoice("triton", "test", prefill=prefill)
        result = _run(prefill_cases()[0], kernels, torch.device("meta"), 0, True)
        assert result.family == kernels.name
    assert asked == [True, False]
