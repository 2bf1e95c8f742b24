"""Start a host's real HTTP server as a child process, wait until it answers, and stop it for sure.

Used by the demo, the benchmarks and the tests; listens on loopback only. Nothing outlives the
process that started it: signals that end it stop the server; where it is killed, a watchdog does.
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

_PROC = Path("/proc")
_LISTENING = "0A"
# Waits until the other end of its input is closed, as it is when this process is gone in whatever
# way, and ends the group of the server.
_WATCHDOG = 'read -r _; kill -s TERM -- "-$1"; sleep 5; kill -s KILL -- "-$1"'
# Straight to loopback, whatever proxy the shell names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

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
        self.port = port
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
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "m3-plugin-watchdog", str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # neither Ctrl-C nor the end of a terminal reaches it
            start_new_session=True,
        )

    def wait_until_ready(
        self, *, timeout_s: float = 600.0, on_wait: Callable[[str], None] | None = None
    ) -> None:
        """Return once `/health` answers, from a process that was started here.

        Parameters
        ----------
        timeout_s : how long the start may take
        on_wait : called about twice a second with the newest line of the log

        Raises
        ------
        ServerFailed : the process ended, the time ran out, or somebody else's server has the port.
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
                if (stranger := listener_outside(self.port, session=self.process.pid)) is None:
                    return
                raise ServerFailed(
                    f"{self.url} is answered by {stranger}, which was not started here: another "
                    "process took the port first; try again"
                )
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
        self._watchdog.kill()
        self._watchdog.wait()
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()

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
            with _OPENER.open(f"{self.url}/health", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def listener_outside(port: int, *, session: int) -> str | None:
    """Who listens on a loopback port and does not belong to a session; None if nobody does.

    A free port may be taken by anybody before a server binds it, and whoever does so would be asked
    the questions and give the answers. None too where the system has no `/proc` to look into.
    """
    sockets = _listening_sockets(port)
    if not sockets:
        return None
    for process in _PROC.glob("[0-9]*"):
        if sockets & _sockets_of(process) and _session_of(process) == session:
            return None
    return f"a process of another session (sockets {', '.join(sorted(sockets))})"


def _listening_sockets(port: int) -> set[str]:
    """Inodes of the sockets that listen on a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _sockets_of(process: Path) -> set[str]:
    """Inodes of a process's sockets, as far as they may be seen."""
    found = set()
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            # descriptors close while they are looked at
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target.startswith("socket:["):
                    found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found


def _session_of(process: Path) -> int | None:
    try:
        # after the name, which may hold anything: state, parent, group, session
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError, ValueError):
        return None


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a lost terminal, unwind the stack as Ctrl-C does.

    So that what was started is stopped. Only where nobody else decided (`nohup` ignores SIGHUP),
    and in the main thread, the only one that may.
    """
    ending = (signal.SIGTERM, signal.SIGHUP)
    free = [number for number in ending if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        free = []

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    for number in free:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
