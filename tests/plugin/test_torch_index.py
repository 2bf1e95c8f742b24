"""Environments find the CPU build of torch: a real pip, and small package indexes on disk."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "constraints" / "torch_index.py"
TORCH = "torch==2.13.0+cpu"


def index(folder: Path, *versions: str) -> str:
    """A package index on disk that holds these releases of torch; returns its address."""
    pages = folder / "torch"
    pages.mkdir(parents=True)
    for version in versions:
        info = f"torch-{version}.dist-info"
        wheel = pages / f"torch-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}"
            )
            file.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
            )
            file.writestr(f"{info}/RECORD", "")
    links = "".join(f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in pages.glob("*.whl"))
    (pages / "index.html").write_text(f"<html><body>{links}</body></html>")
    return folder.as_uri()


def ask(tmp_path: Path, configured: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command with a pip that knows one index, and PyTorch's own replaced by `elsewhere`."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"numpy==2.4.0\n{TORCH}\n")
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import torch_index; "
        f"torch_index.PYTORCH_CPU_INDEX = {(tmp_path / 'elsewhere').as_uri()!r}; "
        f"sys.exit(torch_index.main({str(constraints)!r}))"
    )
    environment = {"PATH": "/usr/bin", "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": configured}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_pips_own_index_is_used_where_it_has_the_build(tmp_path: Path) -> None:
    done = ask(tmp_path, index(tmp_path / "own", "2.13.0", "2.13.0+cpu"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pytorchs_index_is_used_only_where_pips_lacks_it(tmp_path: Path) -> None:
    elsewhere = index(tmp_path / "elsewhere", "2.13.0+cpu")
    done = ask(tmp_path, index(tmp_path / "own", "2.13.0"))
    assert done.returncode == 0
    assert done.stdout == f"--extra-index-url={elsewhere}\n"
    assert done.stderr == f"{TORCH}: pip's indexes lack it, so it comes from {elsewhere}\n"


def test_a_named_index_is_used_unasked(tmp_path: Path) -> None:
    done = ask(tmp_path, index(tmp_path / "own", "2.13.0+cpu"), TORCH_INDEX="file:///mine")
    assert (done.returncode, done.stdout) == (0, "--extra-index-url=file:///mine\n")
    assert done.stderr == f"{TORCH}: from file:///mine, as TORCH_INDEX says\n"


def test_one_sentence_where_nobody_has_it(tmp_path: Path) -> None:
    index(tmp_path / "elsewhere", "2.12.0+cpu")
    done = ask(tmp_path, index(tmp_path / "own", "2.13.0"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "set TORCH_INDEX to an index that has it" in done.stderr


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "constraints").glob("*.txt")), ids=lambda p: p.stem
)
def test_every_environment_pins_a_cpu_build(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line.startswith("torch==")]
    assert len(lines) == 1
    assert lines[0].endswith("+cpu")
