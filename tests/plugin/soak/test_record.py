"""What is kept of a run, what is found in it, and how a file goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from m3_plugin.soak.driver import Outcome
from m3_plugin.soak.processes import Process, processes_of_session
from m3_plugin.soak.record import (
    LEAST_FOR_A_SLOPE,
    LEAST_READINGS,
    WARM_UP,
    Counters,
    Minute,
    Run,
    slope,
)
from tests.processes import wait_until

OUTCOME = Outcome(
    number=4,
    kind="chain",
    verdict="right",
    detail="",
    status=200,
    seconds=2.0,
    first_s=1.0,
    prompt_tokens=100,
    completion_tokens=5,
    beside=(2, 3),
)
FAULT = replace(OUTCOME, verdict="wrong", detail="expected 'a', got 'b'", seconds=99.0)


def minute(
    rss_mb: float = 500.0, *, used: float | None = 0.0, server: int = 0, idle: bool = True
) -> Minute:
    return Minute.of(
        [OUTCOME, replace(OUTCOME, seconds=4.0, first_s=None), FAULT],
        server=server,
        drafts=False,
        idle=idle,
        seconds=61.23,
        before=Counters(3, 100, 0.5),
        after=Counters(5, 400, used),
        processes=[Process(7, "engine", rss_mb - 100, 30, 9), Process(8, "api", 100.0, 12, 4)],
    )


def test_a_minute() -> None:
    found = minute()
    assert found.verdicts == {"right": 2, "wrong": 1}
    # what is wrong says nothing about how long an answer takes
    assert found.latency_s == (3.0, 4.0, 4.0)
    assert found.first_token_s == (1.0, 1.0, 1.0)
    assert (found.preemptions, found.hit_tokens, found.used_when_idle) == (2, 300, 0.0)
    assert found.totals == {"rss_mb": 500.0, "files": 42, "threads": 13}
    nothing = Counters(None, None, None)
    empty = Minute.of(
        [],
        server=0,
        drafts=True,
        idle=True,
        seconds=60,
        before=nothing,
        after=nothing,
        processes=[],
    )
    assert empty.latency_s is empty.preemptions is empty.used_when_idle is None


def test_a_run_survives_its_file() -> None:
    run = Run(minutes=[minute(), minute()], faults=[FAULT], next_number=9, servers=1)
    stored = json.loads(json.dumps(run.as_dict()))
    again = Run.from_dict(stored)
    assert json.loads(json.dumps(again.as_dict())) == stored
    assert again.minutes[1].processes == run.minutes[1].processes
    assert again.faults == run.faults


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Run(faults=[FAULT]), "request 4 (chain) is wrong: expected 'a'"),
        (Run(ended="ended with -9"), "the server is gone: ended with -9"),
        (Run(minutes=[minute(), minute(used=0.25)]), "minute 1: 25.00% of the cache is held"),
    ],
)
def test_findings(run: Run, said: str) -> None:
    (finding,) = run.findings(largest_slope=1.0)
    assert said in finding


def test_slopes_begin_after_the_warm_up_and_are_those_of_one_server() -> None:
    warm = [minute(500 + 50 * i) for i in range(WARM_UP)]
    growing = [minute(1000 + 2.5 * i) for i in range(LEAST_FOR_A_SLOPE)]
    (found,) = Run(minutes=warm + growing).slopes()
    assert found["rss_mb"] == pytest.approx(2.5)
    assert found["files"] == found["threads"] == 0
    (finding,) = Run(minutes=warm + growing).findings(largest_slope=1.0)
    assert "resident memory grows by 2.50 MB a minute, more than 1" in finding
    assert Run(minutes=warm + growing).findings(largest_slope=3.0) == []
    # too short to say anything, and another server begins anew
    assert Run(minutes=warm + growing[1:]).findings(largest_slope=1.0) == []
    other = [replace(entry, server=1) for entry in growing]
    assert [entry["rss_mb"] for entry in Run(minutes=warm + other).slopes()] == [None, None]
    assert slope([(at, 3.0) for at in range(LEAST_FOR_A_SLOPE)]) == 0


def test_slopes_are_those_of_quiet_moments() -> None:
    growing = [
        minute(1000 + 2.5 * i + (300 if i % 3 else 0), idle=i % 3 == 0, used=0.5 if i % 3 else 0.0)
        for i in range(WARM_UP + 3 * LEAST_READINGS)
    ]
    run = Run(minutes=growing)
    (found,) = run.slopes()
    assert found["rss_mb"] == pytest.approx(2.5)
    # pages in use while requests run are no finding
    (finding,) = run.findings(largest_slope=1.0)
    assert "resident memory" in finding
    assert slope([(3 * at, 1.0) for at in range(LEAST_READINGS - 1)]) is None


def test_processes_of_a_session_are_seen() -> None:
    script = "import os, time; os.fork(); print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], start_new_session=True, stdout=subprocess.PIPE
    ) as parent:
        try:
            assert parent.stdout is not None
            # both have said so
            assert parent.stdout.readline() == parent.stdout.readline() == b"\n"
            found = processes_of_session(parent.pid)
        finally:
            os.killpg(parent.pid, 9)
    assert found[0].pid == parent.pid
    assert len(found) == 2
    assert all(process.rss_mb > 1 and process.files >= 3 for process in found)
    assert {process.threads for process in found} == {1}
    assert wait_until(lambda: not processes_of_session(parent.pid))
