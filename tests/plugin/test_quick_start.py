"""The README's quick start, read out of the README and followed where nothing is set up."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# How a machine reaches its package index is its own affair; everything else starts empty.
KEPT = re.compile(r"PIP_\w+|SSL_\w+|CURL_CA_BUNDLE|REQUESTS_CA_BUNDLE|(?i:\w+_proxy)")


def quick_start() -> list[str]:
    """The two commands that the README gives as proof, and the variant named below it."""
    section = (REPOSITORY / "README.md").read_text().partition("## Two commands as proof")[2]
    section = section.partition("\n## ")[0]
    fenced = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in fenced for line in block.splitlines()]
    return [*filter(None, lines), *re.findall(r"`(make [^`]*HOST=[^`]*)`", section)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What is committed, and nothing else."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path / "m3-plugin"
    command = ["git", "clone", "--quiet", "--no-hardlinks", str(REPOSITORY), str(folder)]
    subprocess.run(command, check=True, timeout=120)
    return folder


def follow(line: str, *, clone: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run one line as a new user would: an empty home, and no variables but the path."""
    home = clone.parent / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    # python3 and make of the machine, and not those of the environment that runs this test
    own = str(Path(sys.prefix) / "bin")
    path = [part for part in os.environ["PATH"].split(os.pathsep) if part != own]
    return subprocess.run(
        shlex.split(line),
        cwd=clone,
        env={"HOME": str(home), "PATH": os.pathsep.join(path), **kept},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def test_it_is_what_the_readme_says() -> None:
    assert quick_start() == ["make demo", "make test", "make demo HOST=sglang"]


@pytest.mark.parametrize("line", quick_start())
def test_a_fresh_clone_knows_every_command(line: str, clone: Path) -> None:
    """Every rule and every file it needs is committed; nothing is run."""
    done = follow(f"{line} --dry-run", clone=clone, timeout_s=60)
    assert done.returncode == 0, done.stdout
    # it would set itself up first
    assert "install" in done.stdout.partition("m3-plugin demo")[0].partition("pytest")[0]


@pytest.mark.extended
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("line", [line for line in quick_start() if line.startswith("make demo")])
def test_followed_literally(line: str, clone: Path) -> None:
    """Environment, server and answers, from nothing; `make test` would run this file again."""
    done = follow(line, clone=clone, timeout_s=3000)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all answers right" in done.stdout
    changed = subprocess.run(
        ["git", "-C", str(clone), "status", "--porcelain"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert changed.stdout == ""
