"""Reading a server's own numbers: of one that has them, has none, or is late with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from m3_plugin.cli import host_metrics
from m3_plugin.cli.host_metrics import exposition, settled, total

TEXT = """# HELP vllm:asked_total Requests
vllm:asked_total{model="a",phase="decode"} 2.0
vllm:asked_total{model="b",phase="decode"} 3.0
vllm:asked_total{model="a",phase="prefill"} 40.0
vllm:other_total 500.0
"""


class Handler(BaseHTTPRequestHandler):
    status: ClassVar = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/metrics" else 500)
        self.end_headers()
        self.wfile.write(TEXT.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_metrics_of_a_server(url: str) -> None:
    text = exposition(url)
    assert total(text, "vllm:asked_total") == 45
    assert total(text, "vllm:asked_total", label='phase="decode"') == 5
    assert total(text, "vllm:nothing") == 0


def test_a_server_without_metrics_has_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "status", 404)
    assert exposition(url) == ""
    assert exposition("http://127.0.0.1:9") == ""


def test_late_counters_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(host_metrics.time, "sleep", slept.append)
    looks = iter([1, 1, 2, 3])
    assert settled(lambda: next(looks), lambda count: count >= 2) == 2
    assert len(slept) == 2


def test_counters_that_never_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(host_metrics.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(host_metrics.time, "sleep", lambda seconds: None)
    assert settled(lambda: 1, lambda count: count >= 2) == 1
