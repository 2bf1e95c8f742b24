"""Start a host's real HTTP server as a child process, wait until it answers, and stop it for sure.

Used by the demo, the benchmarks and the tests; listens on loopback only.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from m3_plugin.host.children import LOOPBACK, child_environment, python

_ERROR = re.compile(r"\b\w*(?:Error|Exception): .+")


class ServerFailed(RuntimeError):
    """The server ended, stayed silent or refused.

    Attributes
    ----------
    reason : in one line; the message also carries the end of the server's log, if there is one
    """

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


def named_error(log: str) -> str | None:
    """The last error a log names, but for those that only point at another one."""
    errors = _ERROR.findall(log)
    causes = [error for error in errors if "root cause" not in error]
    return (causes or errors or [None])[-1]


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def vllm_command(model: Path, *, port: int, options: Sequence[str] = ()) -> list[str]:
    """Command line of vLLM's OpenAI server in the running interpreter's environment.

    The module is started rather than the `vllm` script because the CPU distribution's script looks
    up the version of a distribution called `vllm` and does not find one.
    """
    module = "vllm.entrypoints.openai.api_server"
    endpoint = ["--host", LOOPBACK, "--port", str(port)]
    return python("-m", module, "--model", str(model), *endpoint, *options)


def sglang_command(model: Path, *, port: int, options: Sequence[str] = ()) -> list[str]:
    """Command line of SGLang's OpenAI server in the running interpreter's environment."""
    endpoint = ["--host", LOOPBACK, "--port", str(port)]
    module = "sglang.launch_server"
    return python("-m", module, "--model-path", str(model), *endpoint, *options)


class ServerProcess:
    """One server with its whole process group. Use as a context manager.

    Parameters
    ----------
    command : what to start; it must listen on `port`
    port : loopback port of the HTTP API
    log : file that receives the server's output
    environment : additions to the current environment
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self.log = log
        self._stack = contextlib.ExitStack()
        with log.open("wb") as output:
            # a session of its own, so that stopping reaches the engine and worker processes too
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(environment),
                start_new_session=True,
            )

    def wait_until_ready(
        self, *, timeout_s: float = 600.0, on_wait: Callable[[str], None] | None = None
    ) -> None:
        """Return once `/health` answers.

        Parameters
        ----------
        timeout_s : how long the start may take
        on_wait : called about twice a second with the newest line of the log

        Raises
        ------
        ServerFailed : the process ended, or the time ran out.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                # the end of a long log seldom holds what went wrong first
                text = self.log.read_text(errors="replace")
                reason = named_error(text) or self.log_tail(lines=1) or "its log is empty"
                raise ServerFailed(
                    f"end of {self.log}:\n{self.log_tail()}\n\n"
                    f"server ended with {self.process.returncode}: {reason}",
                    reason=reason,
                )
            if self._answers():
                return
            if on_wait is not None:
                on_wait(self.log_tail(lines=1))
            time.sleep(0.5)
        silence = f"server did not answer within {timeout_s:.0f} s"
        raise ServerFailed(f"{silence}; end of its log:\n{self.log_tail()}", reason=silence)

    def log_tail(self, *, lines: int = 30) -> str:
        """The last lines of the server's output."""
        text = self.log.read_text(errors="replace")
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def stop(self, *, grace_s: float = 20.0) -> None:
        """Ask the server to end, then make sure that nothing of its process group is left."""
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> ServerProcess:
        # a terminated process must stop its server as an interrupted one does
        self._stack.enter_context(terminate_as_exit())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            self.stop()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that what was started is stopped.

    Only where nobody else decided, and in the main thread, the only one that may.
    """
    alone = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
