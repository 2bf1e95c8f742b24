"""Version windows and the sentences a process says about itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from m3_plugin.attention.backends import KernelChoice
from m3_plugin.host.presence import PluginRefusal, TestedWindow, attestation, require_tested
from m3_plugin.settings import Settings

WINDOW = TestedWindow(package="host", minimum="0.31", below="0.34")


@pytest.mark.parametrize(
    "version", ["0.31.0", "0.32.0+cpu", "0.33.1", "0.33.0.post1", "0.32.1rc2.dev3+gabc"]
)
def test_inside(version: str) -> None:
    require_tested(WINDOW, version, settings=Settings())


@pytest.mark.parametrize("version", ["0.30.0", "0.34.0", "0.34.0rc1", "1.0"])
def test_outside_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(PluginRefusal, match="M3_PLUGIN_ALLOW_UNTESTED=1") as error:
        require_tested(WINDOW, version, settings=Settings())
    assert version in str(error.value)
    require_tested(WINDOW, version, settings=Settings(allow_untested=True))


def test_attestation_says_what_runs_and_what_was_refused() -> None:
    kernels = KernelChoice(
        family="torch", reason="best available on cpu", refused=(("native", "no compiler"),)
    )
    line = attestation(
        host="vLLM", host_version="0.32.0", kernels=kernels.describe(), detail="serving"
    )
    assert "vLLM 0.32.0" in line
    assert "torch (best available on cpu; native refused: no compiler)" in line


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.31.0", True), ("0.32.0+cpu", True), ("0.32.5", True), ("0.33.0", False), ("0.3", False)],
)
def test_releases_that_the_suite_ran_on(version: str, tested: bool) -> None:
    window = TestedWindow(package="host", minimum="0.31", below="0.34", tested=("0.31", "0.32"))
    assert window.was_tested(version) is tested


@pytest.mark.parametrize(
    ("adapter", "matrices"),
    [("vllm", ["VLLM_MATRIX"]), ("sglang", ["SGLANG_MATRIX", "SGLANG_OLDER"])],
)
def test_tested_releases_are_those_of_the_matrix(adapter: str, matrices: list[str]) -> None:
    """What doctor calls tested is what `make test-matrix` runs; the adapters import their hosts."""
    root = Path(__file__).parents[3]
    source = (root / "integrations" / adapter / f"m3_{adapter}" / "compat.py").read_text()
    tested = re.findall(r'"([\d.]+)"', source.partition("tested=(")[2].partition(")")[0])
    makefile = (root / "Makefile").read_text()
    run = [re.findall(rf"^{name} +\?= (.*)$", makefile, re.MULTILINE)[0] for name in matrices]
    assert sorted(tested) == sorted(" ".join(run).split())
