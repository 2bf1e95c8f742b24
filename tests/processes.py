"""Processes that tests start: whether they run, and waiting for what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# A loaded machine is no fault.
_PATIENCE_S = 60.0


def wait_until(fact: Callable[[], bool], seconds: float = _PATIENCE_S) -> bool:
    """Whether it becomes true in time.

    What was killed lasts until the kernel has taken its memory, and nobody but its parent can wait
    for that: ask with this whether it is gone.
    """
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX"
