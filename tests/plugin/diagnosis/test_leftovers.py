"""What stays after `pip uninstall`, in a prefix of its own, and that it can be removed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_kernels import native_build
from m3_plugin.cli import app
from m3_plugin.diagnosis import Report
from m3_plugin.diagnosis.leftovers import examine_leftovers, find_leftovers
from m3_plugin.host import torchvision_ops
from tests.plugin.cli.schemas import checked

OTHERS = ("vllm/modelinfos/qwen3-Qwen3ForCausalLM.json", "other/kernels.so", "site/other.pth")


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches and site-packages with things of ours in them, and things of others."""
    site = tmp_path / "site"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    real = torchvision_ops.hook_files
    monkeypatch.setattr(
        "m3_plugin.diagnosis.leftovers.hook_files", lambda folder: real(folder or str(site))
    )
    for name in (*OTHERS, "m3-plugin/native/0123.so", "vllm/modelinfos/m3_vllm-model-M3.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    torchvision_ops.install(str(site))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_listed_then_removed_and_nothing_else(prefix: Path) -> None:
    before = names(prefix)
    listed = checked("uninstall-leftovers", run("--json"))
    assert listed["removed"] is False
    kinds = [entry["id"] for entry in listed["leftovers"]]
    assert kinds == ["start_hook", "start_hook", "build_cache", "model_info"]
    # the .pth first: Python would complain of one without its module
    assert listed["leftovers"][0]["path"].endswith(".pth")
    assert names(prefix) == before
    assert run().rstrip().endswith("next: m3-plugin uninstall-leftovers --yes")
    assert run("--yes").rstrip().endswith("next: pip uninstall m3-plugin")
    assert names(prefix) == sorted(OTHERS)
    assert "nothing is left" in run("--yes")


def run(*options: str) -> str:
    result = CliRunner().invoke(app, ["uninstall-leftovers", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_of_a_link_the_link_alone_goes(prefix: Path) -> None:
    elsewhere = prefix / "shared"
    (prefix / "m3-plugin").rename(elsewhere)
    (prefix / "m3-plugin").symlink_to(elsewhere)
    run("--yes")
    assert (elsewhere / "native" / "0123.so").exists()
    assert not (prefix / "m3-plugin").is_symlink()


def test_doctor_names_them(prefix: Path) -> None:
    examine_leftovers(report := Report())
    (finding,) = report.findings
    assert (finding.id, finding.status) == ("plugin.leftovers", "note")
    assert str(prefix / "m3-plugin") in finding.value
    assert "m3-plugin uninstall-leftovers" in finding.advice
    run("--yes")
    examine_leftovers(report := Report())
    assert report.findings == []


def test_the_compiled_kernels_lie_where_they_are_looked_for(prefix: Path) -> None:
    folder = native_build._cache_folder()
    assert folder is not None
    assert any(folder.is_relative_to(leftover.path) for leftover in find_leftovers())


def test_the_hook_of_this_python_is_the_one_that_is_looked_for() -> None:
    copy, pth = torchvision_ops.hook_files()
    assert pth.parent == copy.parent
    assert str(pth.parent) in [os.path.abspath(folder) for folder in sys.path]
