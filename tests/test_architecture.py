"""The shape of the repository: what may import what, what an import may do, what a wheel holds."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parent.parent
SOURCES = [
    "m3_plugin",
    "kernels/m3_kernels",
    "integrations/vllm/m3_vllm",
    "integrations/sglang/m3_sglang",
]
PACKAGES = [path.rpartition("/")[2] for path in SOURCES]

IMPORT = """
import os, sys
before = dict(os.environ)
import {package}
import torch
heavy = {{"vllm", "sglang", "transformers", "triton", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
assert dict(os.environ) == before
"""


@pytest.mark.parametrize("package", [*PACKAGES, "m3_plugin.cli", "m3_plugin.testing"])
def test_an_import_is_light_and_silent(package: str) -> None:
    code = IMPORT.format(package=package)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


@pytest.mark.parametrize("folder", ["kernels", "integrations", "integrations/vllm"])
def test_source_roots_are_not_packages(folder: str) -> None:
    """A package called `kernels` would shadow the library that transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_module_is_called_utils() -> None:
    folders = [ROOT / path for path in SOURCES]
    assert all(folder.is_dir() for folder in folders)
    assert not [path for folder in folders for path in folder.rglob("utils.py")]


def test_nothing_waits_for_the_wall_clock() -> None:
    """It jumps. What is measured or waited for is so by monotonic clocks; reports have a date."""
    calls = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow|today)\(")
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if calls.search(path.read_text())}
    assert found == {"m3_plugin/cli/bench/report.py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize(
    "name",
    [
        "m3_kernels/index_topk/native.cpp",
        "m3_kernels/native_common.h",
        "m3_plugin/testing/chat_template.jinja",
        "m3_vllm/py.typed",
    ],
)
def test_the_wheel_holds_what_is_not_python(wheel: zipfile.ZipFile, name: str) -> None:
    assert name in wheel.namelist()


def test_the_wheel_announces_plugin_and_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    text = wheel.read(entry_points).decode()
    assert "[vllm.general_plugins]\nm3 = m3_vllm:register" in text
    assert "m3-plugin = m3_plugin.cli:app" in text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_mutant_has_its_place(fault: Fault) -> None:
    """Text that has moved on would end `make mutants` midway."""
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    for path in fault.tests:
        assert (ROOT / path.partition("::")[0]).exists()
