"""What lies in the current folder is never imported by a process that we start."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.cli.bench import serve as bench_serve
from m3_plugin.diagnosis.child import ChildFailed, ask
from m3_plugin.host.processes import environment, python
from m3_plugin.host.serving import ServerProcess, sglang_command, vllm_command
from tests.planted import plant

REPOSITORY = Path(__file__).parents[3]
SHIPPED = ("m3_plugin", "kernels", "integrations")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with a stranger's modules, which PYTHONPATH points at as relative paths do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "../" + tmp_path.name]))
    return plant(tmp_path)


def test_the_planted_modules_would_run(ran: Path) -> None:
    """The other tests here could fail: this is what they guard against."""
    subprocess.run(["python3", "-c", "import torch"], capture_output=True, check=False)
    assert "torch" in ran.read_text()


def ask_a_module() -> None:
    try:
        ask("m3_plugin.diagnosis.device", timeout_s=120)
    except ChildFailed as failure:
        pytest.fail(str(failure))


def serve(command: Callable[..., list[str]]) -> Callable[[], None]:
    """Start what the command does, but for the server, which a program of imports replaces."""

    def run() -> None:
        whole = command(Path("."), port=1)
        program = (
            "import torch, typer, packaging, subprocess, sys; "
            "subprocess.run([sys.executable, '-c', 'import numpy'], check=True)"
        )
        with ServerProcess(
            [*whole[: whole.index("-m")], "-c", program], port=1, log=Path("log")
        ) as server:
            assert server.process.wait(120) == 0, Path("log").read_text()

    return run


def client(which: str) -> Callable[[], None]:
    def run() -> None:
        server = bench_serve.Server(name="x", url="http://127.0.0.1:1", model="m", tokenizer=".")
        load = bench_serve.Load(context=1, output_tokens=1, requests=1, concurrency=1)
        command = getattr(bench_serve, f"_{which}_client")(server, load, Path("result.json"))
        begin = next(i for i, part in enumerate(command) if part in ("-m", "-c"))
        program = [*command[:begin], "-c", "import torch, typer, packaging"]
        subprocess.run(program, env=environment(), check=True, timeout=120)

    return run


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(ask_a_module, id="doctor's questions"),
        pytest.param(serve(vllm_command), id="a vLLM server"),
        pytest.param(serve(sglang_command), id="an SGLang server"),
        pytest.param(client("vllm"), id="vLLM's benchmark"),
        pytest.param(client("sglang"), id="SGLang's benchmark"),
    ],
)
def test_nothing_in_the_current_folder_runs(start: Callable[[], None], ran: Path) -> None:
    start()
    assert not ran.exists(), ran.read_text()


def test_only_one_room_starts_this_interpreter() -> None:
    """Whoever names `sys.executable` elsewhere starts Python without `-P`."""
    found = []
    for folder in SHIPPED:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable":
                    found.append(str(path.relative_to(REPOSITORY)))
    assert found == ["m3_plugin/host/processes.py"]


def test_variables_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/kept", "relative", "."]))
    variables: dict[str, Any] = environment({"ADDED": "1"})
    assert variables["PYTHONPATH"] == "/kept"
    assert variables["PYTHONSAFEPATH"] == variables["ADDED"] == "1"
    monkeypatch.setenv("PYTHONPATH", "relative")
    assert "PYTHONPATH" not in environment()
    assert python("-m", "module")[1:] == ["-P", "-m", "module"]
