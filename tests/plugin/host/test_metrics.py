"""The plugin's presence in the host's own /metrics."""

from __future__ import annotations

import pytest

from m3_plugin.cli.host_metrics import total

prometheus_client = pytest.importorskip("prometheus_client")


def test_presence_is_exported_with_what_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    from m3_plugin import __version__
    from m3_plugin.host.metrics import export_presence

    reason = "the C++ kernels do not compile (exit 1): /home/somebody/x.cpp:1: error: a\nb"
    export_presence("torch", refused=[("native", reason)], device_type="cpu")
    text = prometheus_client.generate_latest().decode()
    version = f'version="{__version__}"'
    assert total(text, "m3_plugin:info{", label=f'kernels="torch",{version}') == 1
    assert total(text, "m3_plugin:kernels_refused{", label='reason="build_failed"') == 1
    # what has paths in it is in the log, not on an open port
    assert "somebody" not in text
    assert "/home/somebody/x.cpp:1: error: a" in caplog.text


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("no C++ compiler found (looked for g++)", "no_compiler"),
        ("the C++ kernels cannot be built or kept: No locks available", "cache"),
        ("another process held /x/y.lock for 600 s; end it", "cache"),
        ("its test failed: RuntimeError: x", "self_test"),
        ("flashinfer-python is not installed", "not_installed"),
        ("this torch is built for ROCm (HIP 7), and ...", "rocm"),
        ("pages of 64", "unsupported"),
    ],
)
def test_labels_come_from_a_closed_set(reason: str, code: str) -> None:
    from m3_plugin.host.metrics import REFUSAL_CODES, refusal_code

    assert refusal_code(reason) == code
    assert code in REFUSAL_CODES
    assert all(code.isidentifier() for code in REFUSAL_CODES)


def test_refused_requests_are_counted_by_part() -> None:
    from m3_plugin.host.metrics import count_refused_request

    count_refused_request("audio")
    count_refused_request("audio")
    text = prometheus_client.generate_latest().decode()
    assert total(text, "m3_plugin:requests_refused_total", label='part="audio"') == 2


def test_serving_does_not_need_the_metrics_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from m3_plugin.host import metrics

    fresh = metrics._presence_gauges.__wrapped__
    monkeypatch.setattr(metrics, "_presence_gauges", fresh)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics.export_presence("torch", refused=(), device_type="cpu")
    monkeypatch.setattr(metrics, "_refused_requests", metrics._refused_requests.__wrapped__)
    metrics.count_refused_request("audio")
