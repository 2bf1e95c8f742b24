"""A running server's own numbers: its `/metrics`, read before and after something was asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_Counters = TypeVar("_Counters")


def exposition(url: str) -> str:
    """What the server's `/metrics` says; empty where it has none."""
    import httpx

    try:
        reply = httpx.get(f"{url}/metrics", timeout=60)
    except httpx.HTTPError:
        return ""
    return reply.text if reply.status_code == httpx.codes.OK else ""


def total(exposition: str, name: str, *, label: str = "") -> float:
    """Sum of a Prometheus metric over its labels, of those samples that carry `label`."""
    samples = [line for line in exposition.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in samples if label in line)


def settled(read: Callable[[], _Counters], ready: Callable[[_Counters], bool]) -> _Counters:
    """Read until the counters are ready, for 10 s: a server counts after it has answered.

    Parameters
    ----------
    read : gives the counters up to now
    ready : whether they hold what was asked last
    """
    deadline = time.monotonic() + 10
    while not ready(counters := read()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return counters
