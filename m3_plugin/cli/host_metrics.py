"""A running server's own numbers: its `/metrics`, read before and after something was asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from m3_plugin.host.children import is_loopback

if TYPE_CHECKING:
    from openai import OpenAI

_Counters = TypeVar("_Counters")


def openai_client(url: str, *, timeout_s: float, api_key: str | None = None) -> OpenAI:
    """A client of a server's OpenAI API that asks no proxy for this machine itself.

    Parameters
    ----------
    url : of the server, without "/v1"
    timeout_s : of one request
    api_key : that the server asks for, if it does
    """
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(
        base_url=f"{url}/v1",
        # the client insists on a key, whether or not the server does
        api_key=api_key or "none",
        max_retries=0,
        http_client=DefaultHttpxClient(timeout=timeout_s, trust_env=not is_loopback(url)),
        timeout=timeout_s,
    )


def exposition(url: str) -> str:
    """What the server's `/metrics` says; empty where it has none."""
    import httpx

    try:
        reply = httpx.get(f"{url}/metrics", timeout=60, trust_env=not is_loopback(url))
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
