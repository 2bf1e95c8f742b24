"""Prompts read by one server and answered by another, over HTTP: what both hosts' tests share."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx

from m3_plugin.host.serving import ServerProcess
from m3_plugin.testing.prompts import NeedlePrompt
from tests.integrations.server import MODEL, NO_THINKING

# UCX over loopback.
TRANSPORT = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}


def chat(prompt: NeedlePrompt, **more: Any) -> dict[str, Any]:
    """The body of a greedy chat completion."""
    return {
        "model": MODEL,
        "messages": prompt.messages(),
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        **NO_THINKING,
        **more,
    }


def post(server: ServerProcess, body: dict[str, Any], *, seconds: float = 600) -> httpx.Response:
    """Ask a server, past proxies."""
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=seconds, trust_env=False)


def metric(server: ServerProcess, name: str) -> float:
    """Sum over its labels of one of the host's own counters."""
    lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def said(reply: httpx.Response) -> str:
    """The words of an answer."""
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def kill_while_it_answers(server: ServerProcess, body: dict[str, Any]) -> None:
    """Ask for a stream, kill the server after a few words, and read on.

    Raises
    ------
    httpx.TransportError : the connection broke.
    """
    url = f"{server.url}/v1/chat/completions"
    asked = {**body, "stream": True}
    with (
        httpx.Client(timeout=600, trust_env=False) as client,
        client.stream("POST", url, json=asked) as reply,
    ):
        assert reply.status_code == 200
        for number, line in enumerate(reply.iter_lines()):
            assert "[DONE]" not in line
            if number == 4:
                kill(server)


def kill(server: ServerProcess) -> None:
    """End all processes of a server at once, as a machine that fails does."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
