"""`m3-plugin doctor` beside SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.doctor import check_hidden, check_served, failures


def test_the_plugin_serves(constructed_checkpoint: Path) -> None:
    check_served("sglang", constructed_checkpoint)


def test_an_allow_list_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hidden("sglang", monkeypatch)


def test_a_broken_triton_ends_the_host_and_not_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (loads,) = failures("sglang")
    assert "libtriton is broken" in loads.value
    assert "python -m m3_sglang.probe" in loads.advice
