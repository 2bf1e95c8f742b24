"""`m3-plugin doctor` beside vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.diagnosis import Report, device
from tests.integrations.doctor import (
    ARCHITECTURES,
    break_triton,
    check_hidden,
    check_served,
    failures,
)

OTHER_VERSION = """
import importlib.abc, importlib.machinery, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.version":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.__version__ = "0.99.0"
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def test_the_plugin_serves(constructed_checkpoint: Path, tmp_path: Path) -> None:
    check_served("vllm", constructed_checkpoint, tmp_path)


def test_an_allow_list_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hidden("vllm", monkeypatch)


def test_an_untested_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_VERSION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    version, *classes = failures("vllm")
    assert "vllm 0.99.0 is outside the tested window" in version.value
    assert "M3_PLUGIN_ALLOW_UNTESTED=1" in version.advice
    # the architectures, and the draft where vLLM has one, are left to vLLM's own classes
    assert {found.name for found in classes} >= set(ARCHITECTURES)
    assert all(found.value.startswith("vllm.") for found in classes)
    assert "NOT ACTIVE" in classes[0].advice


@pytest.mark.extended
def test_a_broken_triton_is_named_and_stops_gpus_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU build does without one."""
    break_triton(tmp_path, monkeypatch)
    assert failures("vllm") == []
    for wanted, status in (("cpu", "warning"), ("cuda", "failure")):
        report = Report()
        device.examine(report, wanted)
        (triton,) = [found for found in report.findings if found.name == "Triton"]
        assert triton.status == status
        assert "libtriton is broken" in triton.value
        assert "--force-reinstall triton" in triton.advice
