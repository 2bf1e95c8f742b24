"""The visit to a machine with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.check import _cases
from m3_plugin.testing import gpu_run
from m3_plugin.testing.gpu_run import MODEL_TEST, ROOT, SECONDS, Step, steps, visit
from tests.processes import is_alive, wait_until


def program(name: str, text: str, *, limit: int = 30, **more: object) -> Step:
    return Step(name, (sys.executable, "-c", text), limit, **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu-run", f"PYTHON={sys.executable}", f"OUT={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("no CUDA device that torch can see: nothing was run\n")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"device": None, "steps": []}


def test_each_step_has_its_end(tmp_path: Path) -> None:
    wanted = [
        program("well", "print('first')"),
        program("ill", "raise SystemExit(7)"),
        program("long", "import time; print('begun', flush=True); time.sleep(600)", limit=3),
        program("bare", "", modules=("no_such_module",)),
        program("unable", "", missing="no such tool"),
        program("last", "import m3_kernels, m3_plugin"),
    ]
    found = visit(wanted, tmp_path, seconds=300)
    assert [(one.name, one.state) for one in found] == [
        *(("well", "right"), ("ill", "wrong"), ("long", "cut off")),
        *(("bare", "left out"), ("unable", "left out"), ("last", "right")),
    ]
    assert (tmp_path / "well.txt").read_text() == "first\n"
    assert (tmp_path / "long.txt").read_text() == "begun\n"
    assert [one.reason for one in found[3:5]] == ["not installed: no_such_module", "no such tool"]
    written = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [one["code"] for one in written] == [0, 7, None, None, None, 0]


def test_the_summary_is_written_after_every_step(tmp_path: Path) -> None:
    looking = (
        f"import json; print(len(json.load(open({str(tmp_path / 'summary.json')!r}))['steps']))"
    )
    visit([program("one", ""), program("two", looking)], tmp_path, seconds=300)
    assert (tmp_path / "two.txt").read_text() == "1\n"


def test_a_step_that_has_no_time_is_left_out(tmp_path: Path) -> None:
    (found,) = visit([program("late", "")], tmp_path, seconds=5)
    assert (found.state, found.reason) == ("left out", "no time was left")


def test_a_step_ends_with_all_it_started(tmp_path: Path) -> None:
    mine = str(tmp_path / "pid")
    child = f"import time, os; open({mine!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    visit([program("parent", text, limit=8)], tmp_path, seconds=300)
    started = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not is_alive(started))


def test_the_steps_fit_and_are_commands_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "find_sanitizer", lambda: "compute-sanitizer")
    wanted = steps(tmp_path)
    assert sum(step.limit for step in wanted) <= SECONDS
    assert not any(step.missing for step in wanted)
    assert (ROOT / MODEL_TEST).exists()
    for step in wanted:
        if "m3_plugin.cli" in step.command:
            words = step.command[step.command.index("m3_plugin.cli") + 1 :]
            # every option is understood; there is no GPU for more
            result = CliRunner().invoke(app, list(words))
            assert result.exit_code == 3, (words, result.output)
        if "--only" in step.command:
            only = step.command[step.command.index("--only") + 1]
            assert list(_cases("triton", only, arch=90)), only


def test_no_sanitizer_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "find_sanitizer", lambda: None)
    missing = [step.missing for step in steps(tmp_path) if step.name.startswith("sanitizer")]
    assert missing == ["no compute-sanitizer (wheel nvidia-cuda-sanitizer-api)"] * 2
