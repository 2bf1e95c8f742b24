"""An engine ends with the process that started it: in real processes, without an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from m3_vllm import orphans
from m3_vllm.orphans import end_with_starter, engine_of_first_worker, parent_of
from tests.processes import is_alive, wait_until

# A starter whose child is the engine and whose grandchild is the worker, which watches. The engine
# is deaf to SIGTERM if told so. The worker prints the engine's process id.
_FAMILY = """
import os, signal, sys, time
if os.fork() == 0:
    if sys.argv[1] == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        from m3_vllm import orphans
        orphans._EVERY_S, orphans._GRACE_S = 0.05, 0.3
        orphans.end_with_starter(os.getppid())
        print(os.getppid(), flush=True)
    time.sleep(300)
time.sleep(300)
"""


@pytest.mark.parametrize("hearing", ["hears", "deaf"])
def test_a_killed_starter_takes_its_engine_with_it(hearing: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _FAMILY, hearing],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as starter:
        try:
            assert starter.stdout is not None
            engine = int(starter.stdout.readline())
            assert parent_of(engine) == starter.pid
            # nothing happens while it lives
            time.sleep(0.3)
            assert parent_of(engine) == starter.pid
            starter.kill()
            starter.wait()
            assert wait_until(lambda: not is_alive(engine))
        finally:
            os.killpg(starter.pid, signal.SIGKILL)


def test_one_process_watches() -> None:
    assert engine_of_first_worker("VllmWorker-0") == os.getppid()
    assert engine_of_first_worker("EngineCore_DP0") == os.getpid()
    for other in ("VllmWorker-1", "MainProcess", "RayWorkerWrapper"):
        assert engine_of_first_worker(other) is None


def test_a_starter_that_takes_all_with_it_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "parent_of", lambda pid: 1)
    assert end_with_starter(os.getpid()) is None
    monkeypatch.setattr(orphans, "parent_of", lambda pid: None)
    assert end_with_starter(os.getpid()) is None
