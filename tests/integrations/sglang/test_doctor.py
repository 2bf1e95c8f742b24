"""`m3-plugin doctor` beside SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.doctor import (
    ARCHITECTURES,
    break_triton,
    check_hidden,
    check_served,
    failures,
)


def test_the_plugin_serves(constructed_checkpoint: Path, tmp_path: Path) -> None:
    check_served("sglang", constructed_checkpoint, tmp_path)


def test_an_allow_list_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hidden("sglang", monkeypatch)


@pytest.mark.extended
def test_an_untested_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release's metadata come first on the path, as if pip had upgraded SGLang."""
    (tmp_path / "sglang-0.99.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: sglang\nVersion: 0.99.0\n"
    (tmp_path / "sglang-0.99.0.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    version, *classes = failures("sglang")
    assert "sglang 0.99.0 is outside the tested window" in version.value
    assert "M3_PLUGIN_ALLOW_UNTESTED=1" in version.advice
    assert {found.name for found in classes} >= set(ARCHITECTURES)
    assert all(not found.value.startswith("m3_sglang.") for found in classes)


def test_a_broken_triton_ends_the_host_and_not_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_triton(tmp_path, monkeypatch)
    (loads,) = failures("sglang")
    assert "libtriton is broken" in loads.value
    assert "python -P -m m3_sglang.probe" in loads.advice
