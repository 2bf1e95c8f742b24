"""Nothing that was started may outlive the one who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from m3_plugin.cli.host_metrics import exposition, openai_client
from m3_plugin.host.children import is_loopback, python
from m3_plugin.host.serving import (
    ServerFailed,
    ServerProcess,
    free_port,
    listener_outside,
    named_error,
)
from tests.processes import is_alive, wait_until

# A server with a child of its own, as the hosts have.
SERVER = """
import subprocess, time
print(subprocess.Popen(["sleep", "300"]).pid, flush=True)
time.sleep(300)
"""
# A background job of a shell ignores Ctrl-C, and its children inherit that.
STARTER = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from m3_plugin.host.serving import ServerFailed, ServerProcess, named_error
with ServerProcess(
    [sys.executable, "-c", {SERVER!r}], port=1, log=pathlib.Path(sys.argv[1])
) as server:
    print(server.process.pid, flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_stops_the_server_and_its_children(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "server.log"
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(log)],
        stdout=subprocess.PIPE,
        text=True,
        # under nohup this process ignores SIGHUP, and its children would
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert starter.stdout is not None
    server = int(starter.stdout.readline())
    assert wait_until(lambda: bool(log.read_text().strip()))
    child = int(log.read_text())
    starter.send_signal(number)
    assert starter.wait(60) != 0
    # who is killed cannot wait: the watchdog asks first, and kills after 5 s
    assert wait_until(lambda: not is_alive(server))
    assert wait_until(lambda: not is_alive(child))


def test_the_old_handler_comes_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with ServerProcess(["sleep", "300"], port=1, log=tmp_path / "server.log") as server:
        watchdog = server._watchdog
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    assert watchdog.returncode is not None


# Answers /health as the hosts do, in a child of the process that is started, as SGLang's.
ANSWERING = """
import http.server, multiprocessing, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"m3_plugin:info 1")

def serve():
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()

process = multiprocessing.get_context("fork").Process(target=serve)
process.start()
process.join()
"""


@pytest.fixture
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell whose proxy answers nothing."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_servers_own_answer_counts_whatever_the_proxy(
    tmp_path: Path, behind_a_proxy: None
) -> None:
    port = free_port()
    command = python("-c", ANSWERING, str(port))
    with ServerProcess(command, port=port, log=tmp_path / "server.log") as server:
        server.wait_until_ready(timeout_s=60)
        assert exposition(server.url) == "m3_plugin:info 1"
        client = openai_client(server.url, timeout_s=10)
        assert client.get("/models", cast_to=httpx.Response).status_code == 200
    assert not is_loopback("http://example.org:8000")
    assert is_loopback("http://localhost:8000")


def test_a_strangers_answer_does_not_count(tmp_path: Path) -> None:
    """Somebody took the port between its choice and the server's start."""
    port = free_port()
    stranger = subprocess.Popen(python("-c", ANSWERING, str(port)), start_new_session=True)
    try:
        assert wait_until(lambda: listener_outside(port, session=1) is not None)
        with (
            ServerProcess(["sleep", "300"], port=port, log=tmp_path / "server.log") as server,
            pytest.raises(ServerFailed, match="was not started here"),
        ):
            server.wait_until_ready(timeout_s=60)
        assert listener_outside(port, session=stranger.pid) is None
    finally:
        os.killpg(stranger.pid, signal.SIGKILL)
        stranger.wait()
    # the listener is the stranger's child: it is nobody's to wait for, and ends when it ends
    assert wait_until(lambda: listener_outside(port, session=1) is None)


def test_the_reason_is_the_last_error_that_points_at_no_other() -> None:
    assert named_error("ValueError: first\nTypeError: cannot\nnoise") == "TypeError: cannot"
    assert named_error("all is well") is None
    pointing = (
        "(EngineCore pid=7) ERROR [core.py:1] NotImplementedError: not on CPU.\n"
        "(EngineCore pid=7) Exception: worker failed. See stack trace for root cause.\n"
        "(APIServer pid=1) RuntimeError: initialization failed. See root cause above. Failed: {}\n"
    )
    assert named_error(pointing) == "NotImplementedError: not on CPU."


def test_a_server_that_ends_is_quoted_with_its_reason_last(tmp_path: Path) -> None:
    """The reason stands far above the end of the log."""
    script = "print('ValueError: no such thing'); [print('noise') for _ in range(100)]; exit(3)"
    command = [sys.executable, "-c", script]
    with (
        ServerProcess(command, port=1, log=tmp_path / "server.log") as server,
        pytest.raises(ServerFailed) as failed,
    ):
        server.wait_until_ready(timeout_s=60)
    assert failed.value.reason == "ValueError: no such thing"
    assert str(failed.value).endswith("server ended with 3: ValueError: no such thing")
    assert "noise" in str(failed.value)


def test_a_server_that_stays_silent(tmp_path: Path) -> None:
    with (
        ServerProcess(["sleep", "300"], port=1, log=tmp_path / "server.log") as server,
        pytest.raises(ServerFailed, match="did not answer within 1 s"),
    ):
        server.wait_until_ready(timeout_s=1)
