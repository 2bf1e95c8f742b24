"""An engine in a process of its own, driven over a pipe: what the harnesses of both hosts share.

One process per engine keeps a host's process-wide state (distributed groups, compiled ops, caches)
apart between configurations, and lets the plugin be found the way users get it: through its entry
point, by the host's own loader.

It is forked from one that has imported the host already (`forked.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from tests.integrations import forked, starts

START_TIMEOUT_S = 300
_TAIL = 6000


class EnginePipe:
    """Starts `serve(pipe, *arguments)` in a new process and waits until it has an engine.

    Close it, or use it as a context manager.

    Parameters
    ----------
    serve : ends in `answer_requests`
    environment : variables of the new process, over those of this one
    preload : modules of the host that engines share
    log : file to which the process writes, quoted in errors
    """

    def __init__(
        self,
        serve: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        self._pipe, child = multiprocessing.Pipe()
        self._log = log
        self._process = forked.start(
            serve,
            child,
            *arguments,
            environment={**os.environ, **environment},
            preload=preload,
        )
        child.close()
        starts.count("engine")
        try:
            self._receive(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the engine and wait for its process."""
        if self._process.is_alive():
            try:
                self._pipe.send(None)
                self._process.join(30)
            except (BrokenPipeError, OSError):
                pass
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def kill(self) -> None:
        """End the process at once, as a machine that fails does."""
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def log_text(self) -> str:
        """Everything the engine's processes have written so far; empty without a log."""
        return "" if self._log is None else self._log.read_text(errors="replace")

    def _call(self, command: str, *args: Any) -> Any:
        self._pipe.send((command, args))
        return self._receive(None)

    def _receive(self, timeout: float | None) -> Any:
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"engine said nothing for {timeout} s\n{self._tail()}")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineDiedError(
                f"engine ended with {self._process.exitcode}\n{self._tail()}"
            ) from None
        if not ok:
            raise EngineError(f"{value}\n{self._tail()}")
        return value

    def _tail(self) -> str:
        return self.log_text()[-_TAIL:]


class EngineError(RuntimeError):
    """The engine refused or failed; carries its traceback and the end of its log."""


class EngineDiedError(RuntimeError):
    """The engine's process ended without a word; carries the end of its log."""


def answer_requests(pipe: Connection, start: Callable[[], Any]) -> Any:
    """Start an engine, say so, and call its methods until the other side has enough.

    Returns the engine, or None if it did not start.
    """
    try:
        engine = start()
        pipe.send((True, None))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return None
    while (request := pipe.recv()) is not None:
        command, args = request
        try:
            pipe.send((True, getattr(engine, command)(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    return engine
