"""Ends an engine whose API server was killed: vLLM's own would hold its memory for ever.

vLLM's workers notice when their engine is gone. The engine does not notice that the process which
started it is, if that one had no time to say so (kill -9, out of memory): it stays, with its
workers and all of the device's memory, and a restart finds no room.

To be deleted when every release of the tested window ends such an engine itself.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

# below vLLM's own logger, and without importing it
logger = logging.getLogger("vllm.m3_plugin.orphans")

_PROC = Path("/proc")
_EVERY_S = 2.0
# An engine that was asked to end has so long.
_GRACE_S = 20.0


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where the process is gone, or nobody can tell."""
    with suppress(OSError, IndexError, ValueError):
        # after the name, which may hold anything: state, parent
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return None


def engine_of_first_worker(name: str | None = None) -> int | None:
    """Process id of the engine, in the one worker that is to watch it; None in all others.

    Parameters
    ----------
    name : of this process as vLLM has named it

    An engine inside somebody's own program, and workers that Ray starts, have other names.
    """
    name = name or multiprocessing.current_process().name
    if name == "VllmWorker-0":
        return os.getppid()
    return os.getpid() if name.startswith("EngineCore") else None


def end_with_starter(engine: int) -> threading.Thread | None:
    """Watch, in a thread, who started an engine, and end the engine when that process is gone.

    Parameters
    ----------
    engine : process id

    Returns
    -------
    The thread. None where there is nothing to watch: a starter that is the first process of a
    container takes all others with it, and what the first process adopted was let go on purpose.
    """
    starter = parent_of(engine)
    if starter is None or starter <= 1:
        return None
    thread = threading.Thread(
        target=_watch, args=(engine, starter), name="m3-plugin-orphans", daemon=True
    )
    thread.start()
    return thread


def _watch(engine: int, starter: int) -> None:
    while (parent := parent_of(engine)) == starter:
        time.sleep(_EVERY_S)
    if parent is None:
        # the engine itself has ended
        return
    logger.error(
        "m3-plugin: process %d, which started this engine, is gone; the engine ends, so that it "
        "holds no memory",
        starter,
    )
    with suppress(ProcessLookupError):
        os.kill(engine, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while parent_of(engine) is not None and time.monotonic() < deadline:
            time.sleep(_EVERY_S)
        if parent_of(engine) is not None:
            os.kill(engine, signal.SIGKILL)
