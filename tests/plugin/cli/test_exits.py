"""Exit codes by kind, for every command: 0 right, 1 wrong result, 2 wrong call, 3 environment."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.demo import Answer
from m3_plugin.cli.evaluate.needle import Grid, Result
from m3_plugin.cli.help import NOTES
from m3_plugin.cli.hosts import HOSTS
from m3_plugin.soak.driver import Outcome
from m3_plugin.soak.record import Counters, Minute, Run
from tests.console import in_one_line

Setup = Callable[[pytest.MonkeyPatch, Path], None]

FIT = "fit --model MiniMaxAI/MiniMax-M3-MXFP8"
SOAK = "soak --url http://127.0.0.1:9"
NEEDLE = "eval needle --url http://127.0.0.1:9 --contexts 2048 --depths 50"


def nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The machine as it is."""


def disabled(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("M3_PLUGIN_DISABLE", "1")


def without(*modules: str) -> Setup:
    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        for user in ("cli.hosts", "cli.options", "testing.gguf_file"):
            monkeypatch.setattr(
                f"m3_plugin.{user}.find_spec",
                lambda name: None if name in modules else find_spec(name),
            )

    return setup


def answered(right: bool) -> Setup:
    """A finished grid in needle.json, so that no server is asked."""

    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        grid = Grid(folder / "needle.json", {"needles": "text", "model": None, "prose": "None"})
        grid.add(Result(2048, 0.5, 0, 0.5, 2048, "7", "7" if right else "[/red]", right, 0.1))

    return setup


def soaked(*faults: str) -> Setup:
    """A finished run in soak.json, so that no server is asked."""

    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        minute = Minute.of(
            [],
            server=0,
            drafts=False,
            idle=True,
            seconds=60.0,
            before=Counters(None, None, None),
            after=Counters(None, None, None),
            processes=[],
        )
        run = Run(minutes=[minute] * 3, servers=1)
        for verdict in faults:
            run.faults.append(
                Outcome(3, "chain", verdict, "[/red] of [blue]", 200, 1.0, None, 9, 1, ())  # type: ignore[arg-type]
            )
        settings = {
            "seed": 0,
            "longest": 16384,
            "concurrency": 8,
            "idle_every": 1,
            "needles": "text",
            "speculative": False,
            "max_slope": 1.0,
        }
        module = sys.modules["m3_plugin.cli.soak"]
        book = module._Book(None, settings)
        book.file, book.run = folder / "soak.json", run
        book.save()

    return setup


def demonstrated(right: bool) -> Setup:
    """Answers as a server would have given them; `check_demo` runs the real ones."""

    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        received = "word" if right else "[/red] of [blue]"
        blocks = (1, 2), (1, 2)
        answer = Answer("short chain", "which?", "word", received, 9, 0, *blocks, 0.1, 1.0)
        module = sys.modules["m3_plugin.cli.demo"]
        monkeypatch.setattr(module, "host_to_start", lambda name: HOSTS["vllm"])
        monkeypatch.setattr(module, "_run", lambda host, **options: ([answer], []))

    return setup


def own_caches(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setattr("m3_plugin.diagnosis.leftovers.hook_files", lambda folder: ())


def stubborn_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuses(path: Path) -> None:
        raise PermissionError(f"[Errno 13] Permission denied: {path}")

    own_caches(monkeypatch, folder)
    (folder / "m3-plugin").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuses)


CASES: list[tuple[str, int, Setup, str]] = [
    ("doctor --framework sglang --device cuda --timeout 1", 1, nothing, "FAIL"),
    ("doctor --device tpu", 2, nothing, "'tpu' is not one of"),
    (f"{FIT} --gpu H200", 0, nothing, "longest single request"),
    (f"{FIT} --gpu L40S", 1, nothing, "does not fit"),
    (f"{FIT} --gpu H300", 2, nothing, "--gpu must be one of"),
    ("fit --model nobody/nothing --gpu H200", 3, nothing, "no model 'nobody/nothing'"),
    ("check --device cpu --family torch --only one-token --repeats 0", 0, nothing, "all right"),
    ("check --device cpu --only nothing-of-that-name", 2, nothing, "no case has"),
    ("check --device cpu --family flashinfer", 3, nothing, "it needs a GPU"),
    (f"{NEEDLE} --output needle.json", 0, answered(True), "100%"),
    (f"{NEEDLE} --output needle.json", 1, answered(False), "expected '7'"),
    (f"{NEEDLE} --needles latin", 2, nothing, "'latin' is not one of"),
    (f"{NEEDLE} --model m3", 3, nothing, "is the server running?"),
    (f"{SOAK} --output soak.json", 0, soaked(), "nothing wrong, nothing lost"),
    (f"{SOAK} --output soak.json", 1, soaked("wrong"), "request 3 (chain) is wrong: [/red]"),
    (f"{SOAK} --concurrency 0", 2, nothing, "greater than or equal to 1"),
    (f"{SOAK} --speculative", 2, nothing, "--speculative"),
    (f"{SOAK} --replay soak.json", 3, soaked(), "there is nothing to replay"),
    (SOAK, 3, nothing, "is the server running?"),
    ("soak --longest 40000", 2, nothing, "has room for 31744 tokens"),
    ("soak", 3, disabled, "M3_PLUGIN_DISABLE=1"),
    ("bench serve --against me", 2, nothing, "'me' is not one of"),
    ("bench serve", 3, disabled, "M3_PLUGIN_DISABLE=1"),
    ("bench kernels --peers me", 2, nothing, "unknown: me"),
    ("bench kernels --plot kernels.png", 3, without("matplotlib"), "pip install matplotlib"),
    ("bench cpu --contexts ten", 2, nothing, "not numbers"),
    ("bench cpu --peers llama.cpp", 2, nothing, "needs the folder in which you built llama.cpp"),
    ("bench cpu --peers llama.cpp --llama-cpp .", 3, nothing, "holds none, nor does its bin/"),
    ("bench cpu --plot cpu.png", 3, without("matplotlib"), "pip install matplotlib"),
    ("demo", 0, demonstrated(True), "all answers right"),
    ("demo", 1, demonstrated(False), "[/red] of [blue]"),
    ("demo --long-tokens 7", 2, nothing, "greater than or equal to 2048"),
    ("demo", 3, disabled, "M3_PLUGIN_DISABLE=1"),
    ("blocks . --phase both", 2, nothing, "'both' is not one of"),
    ("blocks .", 3, nothing, "M3_PLUGIN_RECORD_BLOCKS"),
    ("tiny tiny --seed 1", 2, nothing, "has no meaning with --kind constructed"),
    ("tiny tiny --gguf --quant mxfp8", 2, nothing, "--gguf has no words for weights in mxfp8"),
    ("tiny tiny --gguf", 3, without("gguf"), "pip install gguf"),
    ("tiny /proc/m3 --kind random --preset small", 3, nothing, "/proc/m3"),
    ("uninstall-leftovers", 0, own_caches, "nothing is left"),
    ("uninstall-leftovers now", 2, nothing, "unexpected extra argument"),
    ("uninstall-leftovers --yes", 3, stubborn_cache, "Permission denied"),
]
# Those that need a host, a GPU, minutes or broken kernels, and the tests that have them.
ELSEWHERE = {
    ("doctor", 0): "tests/integrations/doctor.py check_served",
    ("check", 1): "test_check.py test_wrong_kernels_end_it",
    ("bench serve", 0): "tests/integrations/insight.py",
    ("bench kernels", 0): "test_bench_kernels.py, on a GPU",
    ("bench kernels", 1): "test_bench_kernels.py, on a GPU",
    ("bench cpu", 0): "test_bench_cpu.py test_report",
    ("bench cpu", 1): "test_bench_cpu.py test_no_numbers_when_the_methods_disagree",
    ("blocks", 0): "test_selection.py test_picture_and_numbers",
    ("tiny", 0): "test_constructed.py TestCommand",
}


@pytest.mark.parametrize(
    ("line", "status", "setup", "said"), CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES]
)
def test_each_kind_has_its_code(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    status: int,
    setup: Setup,
    said: str,
) -> None:
    if "bench kernels" in line and torch.cuda.is_available() and status == 3:
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("m3_plugin.diagnosis.hosts.version", lambda name: "0.32.0")
    setup(monkeypatch, tmp_path)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == status, result.output
    assert said in in_one_line(result.output)


def test_every_kind_that_help_names_is_tested() -> None:
    named = {
        (words, code)
        for words, notes in NOTES.items()
        for code, text in enumerate((notes.right, notes.wrong, "always", notes.environment))
        if text
    }
    tested = {
        (words, code) for line, code, *_ in CASES for words in NOTES if f"{line} ".startswith(words)
    }
    assert tested.isdisjoint(ELSEWHERE)
    assert tested | ELSEWHERE.keys() == named


def test_errors_leave_stdout_to_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["blocks", ".", "--json"])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "M3_PLUGIN_RECORD_BLOCKS" in result.stderr
