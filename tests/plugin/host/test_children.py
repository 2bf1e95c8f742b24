"""Children of ours import nothing from the folder that somebody stands in."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from m3_plugin.cli.bench import serve
from m3_plugin.cli.bench.serve import Load, Server
from m3_plugin.cli.hosts import HOSTS
from m3_plugin.diagnosis.child import ask
from m3_plugin.host.children import child_environment, python
from m3_plugin.host.serving import ServerProcess, free_port, sglang_command, vllm_command
from tests.planted import MODULES, plant, ran

ROOT = Path(__file__).parents[3]

# Stands for each module that a command of ours starts: it imports what lies planted where that is
# what it would find, and so do the processes that it starts, as hosts start their workers.
CHILD = f"""
import importlib.util, multiprocessing, os, subprocess, sys
PLANTED = {MODULES!r}

def import_all():
    for name in PLANTED:
        found = None if name in sys.modules else importlib.util.find_spec(name)
        if found and found.origin and os.path.dirname(found.origin) == os.getcwd():
            importlib.import_module(name)

def main():
    import_all()
    worker = multiprocessing.get_context("spawn").Process(target=import_all)
    worker.start()
    worker.join()
    code = "import _m3_planted"
    subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
"""
ANSWER = CHILD + (
    "\nif __name__ == '__main__':\n"
    "    main()\n"
    "    from m3_plugin.diagnosis.child import answer\n"
    "    answer({'path': sys.path})\n"
)
SERVED = CHILD + "\nif __name__ == '__main__':\n    main()\n    print('done', flush=True)\n"


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a planted folder that `PYTHONPATH` names in every way it can; the witness."""
    witness = tmp_path / "witness"
    folder = tmp_path / "checkpoint"
    plant(folder, witness=witness)
    monkeypatch.chdir(folder)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(stubs), "../checkpoint"]))
    return witness


def write_module(tmp_path: Path, name: str, source: str) -> None:
    """A module that is found before the real one of that name."""
    *packages, module = name.split(".")
    folder = tmp_path / "stubs"
    for package in packages:
        folder = folder / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{module}.py").write_text(source)


def test_a_question_of_doctor(standing: Path, tmp_path: Path) -> None:
    write_module(tmp_path, "asked", ANSWER)
    facts, _ = ask("asked", timeout_s=60)
    assert os.getcwd() not in facts["path"]
    assert str(tmp_path / "stubs") in facts["path"]
    assert ran(standing) == []


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("vllm.entrypoints.openai.api_server", vllm_command),
        ("sglang.launch_server", sglang_command),
    ],
)
def test_a_server_of_demo_bench_and_eval(
    standing: Path, tmp_path: Path, module: str, command: object
) -> None:
    write_module(tmp_path, module, SERVED)
    port = free_port()
    log = tmp_path / "server.log"
    with ServerProcess(command(Path("."), port=port), port=port, log=log) as server:  # type: ignore[operator]
        server.process.wait(60)
    assert log.read_text().strip() == "done"
    assert ran(standing) == []


@pytest.mark.parametrize(
    ("host", "module", "source"),
    [
        ("vllm", "vllm.benchmarks.serve", "import os\nos.abort()\n"),
        ("sglang", "sglang.bench_serving", SERVED),
    ],
)
def test_the_client_of_bench(
    standing: Path, tmp_path: Path, host: str, module: str, source: str
) -> None:
    write_module(tmp_path, module, source)
    load = Load(context=1, output_tokens=2, requests=1, concurrency=1)
    with pytest.raises(serve.ClientFailed):
        serve.run_client(Server("x", "http://127.0.0.1:9", "m", "t"), load, host=HOSTS[host])
    assert ran(standing) == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, None),
        ({"PYTHONPATH": ""}, None),
        ({"PYTHONPATH": "::."}, None),
        ({"PYTHONPATH": ":/a::lib:../up:/b:"}, "/a:/b"),
    ],
)
def test_no_entry_means_the_current_folder(given: Mapping[str, str], kept: str | None) -> None:
    environment = child_environment(inherited=given)
    assert environment.get("PYTHONPATH") == kept
    assert environment["PYTHONSAFEPATH"] == "1"
    assert child_environment(given, inherited={}).get("PYTHONPATH") == kept


def test_grandchildren_are_asked_the_same(standing: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import triton'])"
    subprocess.run(
        python("-c", code), env=child_environment(), stderr=subprocess.DEVNULL, check=False
    )
    assert ran(standing) == []


def test_loopback_goes_through_no_proxy() -> None:
    given = {"http_proxy": "http://proxy:3128", "no_proxy": "example.org"}
    environment = child_environment(inherited=given)
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
    assert environment["NO_PROXY"] == "127.0.0.1,localhost,::1"
    assert child_environment(inherited=environment) == environment


def test_no_other_module_starts_a_python() -> None:
    """`sys.executable` anywhere else would be a child with the current folder on its path."""
    sources = [
        path
        for folder in ("m3_plugin", "kernels", "integrations")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    users = {
        str(path.relative_to(ROOT)) for path in sources if "sys.executable" in path.read_text()
    }
    # kernels know nothing of the plugin; their compile gate starts itself, one chip in each process
    gate = "kernels/m3_kernels/testing/compile_gate.py"
    assert users == {"m3_plugin/host/children.py", gate}
    assert (ROOT / gate).read_text().count("sys.executable") == 1
    assert '(sys.executable, "-P", ' in (ROOT / gate).read_text()


def test_what_we_tell_to_type_is_safe_too() -> None:
    unsafe = re.compile(r"python3? -m \{?(m3_|entry|MODULE)")
    folders = ("m3_plugin", "kernels", "integrations")
    said = [
        (str(path.relative_to(ROOT)), line)
        for folder in folders
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".md")
        for line in path.read_text().splitlines()
        if unsafe.search(line)
    ]
    assert said == [], json.dumps(said)
