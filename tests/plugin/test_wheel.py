"""What `make wheel` builds holds all that a host's environment needs, and the sources all of it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# source root of each package, as pyproject.toml names it
PACKAGES = {
    "m3_plugin": ROOT,
    "m3_kernels": ROOT / "kernels",
    "m3_vllm": ROOT / "integrations" / "vllm",
    "m3_sglang": ROOT / "integrations" / "sglang",
}
KINDS = {".py", ".json", ".jinja", ".cpp", ".h", ".typed"}


def build(kind: str, folder: Path) -> Path:
    """The one file that hatchling makes of this checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of the sdist, below its only folder."""
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def files(package: str) -> set[str]:
    """Of a package in this checkout, as an import sees them."""
    folder = PACKAGES[package] / package
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix in KINDS)
    return {path.relative_to(PACKAGES[package]).as_posix() for path in found}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_a_package(package: str, wheel: zipfile.ZipFile) -> None:
    """Modules, data, chat template, C++ sources; and that the package has types."""
    wanted = files(package)
    assert f"{package}/py.typed" in wanted
    assert wanted - set(wheel.namelist()) == set()


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (info,) = tops - PACKAGES.keys()
    assert info.endswith(".dist-info")
    kinds = {Path(name).suffix for name in wheel.namelist() if not name.startswith(info)}
    assert kinds <= KINDS | {".md"}


def test_each_kind_of_data_is_there(wheel: zipfile.ZipFile) -> None:
    """So that a rule that drops one of them everywhere is seen too."""
    suffixes = {Path(name).suffix for name in wheel.namelist()}
    assert suffixes >= KINDS


def test_both_hosts_find_the_plugin(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(path).decode()
    assert "[vllm.general_plugins]\nm3 = m3_vllm:register" in text
    assert "[sglang.srt.plugins]\nm3 = m3_sglang:register" in text
    assert "m3-plugin = m3_plugin.cli:app" in text


def test_the_wheel_fits_every_platform(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")


def test_the_sources_are_complete(sources: set[str]) -> None:
    """Whoever has the sdist can build, test and deploy."""
    wanted = {
        *("Makefile", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
        *(".ci/run", ".github/workflows/ci.yaml", ".pre-commit-config.yaml"),
        *("deploy/alerts.yaml", "docs/deploy.md", "tests/conftest.py"),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "constraints").glob("*.txt")),
    }
    if (ROOT / "SECURITY.md").exists():
        wanted.add("SECURITY.md")
    assert wanted - sources == set()
    for package, root in PACKAGES.items():
        prefix = root.relative_to(ROOT).as_posix().removeprefix(".")
        inside = {f"{prefix}/{name}".removeprefix("/") for name in files(package)}
        assert inside - sources == set()
