"""Environments are installed by uv or by pip, from the same places: the real ones, from disk."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from constraints.installer import pip_settings, uv_command
from tests.plugin.test_torch_index import index

SCRIPT = Path(__file__).parents[2] / "constraints" / "installer.py"


def install(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """torch's newest release of two indexes, below a constraint, into a folder."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch<3\n")
    environment = {
        "PATH": "/usr/bin",
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": index(tmp_path / "one", "2.1"),
        "PIP_EXTRA_INDEX_URL": index(tmp_path / "two", "2.2", "3.0"),
        "PIP_CONSTRAINT": str(constraints),
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--no-deps", "--target", str(tmp_path / "packages"), "torch"],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def installed(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "packages").glob("torch-*")]


@pytest.mark.skipif(find_spec("uv") is None, reason="uv is not installed beside this interpreter")
def test_uv_takes_what_pip_is_configured_to(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert installed(tmp_path) == ["torch-2.2.dist-info"]
    installer = next((tmp_path / "packages").glob("torch-*")) / "INSTALLER"
    assert installer.read_text().strip() == "uv"


def test_pip_is_asked_at_once(tmp_path: Path) -> None:
    done = install(tmp_path, INSTALLER="pip")
    assert done.returncode == 0, done.stderr
    assert installed(tmp_path) == ["torch-2.2.dist-info"]
    installer = next((tmp_path / "packages").glob("torch-*")) / "INSTALLER"
    assert installer.read_text().strip() == "pip"


@pytest.mark.skipif(find_spec("uv") is None, reason="uv is not installed beside this interpreter")
def test_what_uv_does_not_end_pip_does(tmp_path: Path) -> None:
    """uv can make no cache where a file stands."""
    (tmp_path / "file").write_text("")
    done = install(tmp_path, UV_CACHE_DIR=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    assert "pip is asked (INSTALLER=pip: at once)" in done.stderr
    assert installed(tmp_path) == ["torch-2.2.dist-info"]


def test_pips_settings_become_uvs() -> None:
    """Variables override files, and what is said of `pip install` what is said of all."""
    said = pip_settings(
        ":env:.find-links='/wheels /more'\n"
        "global.find-links='/old'\n"
        "global.index-url='https://one.example/simple'\n"
        "global.timeout='60'\n"
        "install.index-url='https://two.example/simple'\n"
        "install.no-index='true'\n"
        "download.index-url='https://three.example/simple'\n"
        "a line without a value\n"
    )
    command = uv_command("uv", ["--no-deps", "torch"], said)
    assert command[command.index("--index-strategy=unsafe-best-match") + 1 :] == [
        "--index-url=https://two.example/simple",
        "--find-links=/wheels",
        "--find-links=/more",
        "--no-index",
        *("--no-deps", "torch"),
    ]
    assert command[: command.index("--python") + 2][-1] == sys.executable
    assert os.path.isabs(sys.executable)
