"""A server under fire for a short while: `m3-plugin soak`, bad clients, a worker that stands still.

A host's `test_server.py` derives `SoakCases`; what ends a server is in `faults.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from openai import OpenAI, OpenAIError
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.host.children import LOOPBACK
from m3_plugin.host.serving import ServerProcess
from m3_plugin.soak.judging import Model, body_of
from m3_plugin.soak.mixture import Mixture
from m3_plugin.soak.needles import ConstructedNeedles
from m3_plugin.soak.processes import Process, processes_of_session
from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.server import MODEL, NO_THINKING, ask, counter
from tests.plugin.cli.schemas import checked

# Number of a request -> the reply; of vLLM and SGLang alike.
GREEDY = Path(__file__).with_name("greedy.json")


def processes_named(server: ServerProcess, name: str) -> list[Process]:
    """Processes of a server whose name begins so."""
    found = processes_of_session(server.process.pid)
    return [process for process in found if process.name.startswith(name)]


def asked_meanwhile(
    client: OpenAI, seeds: range, *, tokens: int, forgiving: bool = False
) -> tuple[list[bool], Callable[[], None]]:
    """Ask in threads; (whether each answer is right, a function that waits for all).

    Parameters
    ----------
    forgiving : an error is no answer, nor is one whose reason to finish is "abort", as vLLM tells
        who comes when it ends; they count neither way
    """
    right: list[bool] = []

    def one(seed: int) -> None:
        prompt = needle_prompt(seed, num_tokens=tokens)
        with suppress(*([OpenAIError] if forgiving else [])):
            (choice,) = ask(client, prompt.messages(), prompt.max_tokens).choices
            if not forgiving or choice.finish_reason != "abort":
                right.append(choice.message.content == prompt.expected_text)

    def wait() -> None:
        for thread in threads:
            thread.join()

    threads = [threading.Thread(target=one, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    return right, wait


def greedy_reply(url: str, number: int) -> str:
    """What a server of the constructed checkpoint says to a request of one mixture, as it is."""
    request = Mixture(21, 4096).request(number)
    assert not request.temperature
    prompt = ConstructedNeedles().prompt(request)
    body = json.loads(body_of(request, prompt, Model(MODEL, 8192))) | {"stream": False}
    body.pop("stream_options", None)
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
    return reply["choices"][0]["message"]["content"]


class SoakCases:
    """Derive beside `ServerCases`, with a server that checks its steps.

    Attributes
    ----------
    worker : how the process that runs the model calls itself
    """

    worker: ClassVar[str]

    @pytest.mark.parametrize("seconds", [90, pytest.param(180, marks=pytest.mark.extended)])
    def test_every_answer_under_fire_is_right(
        self, server: ServerProcess, seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # the command has the name of its module
        monkeypatch.setattr(sys.modules["m3_plugin.cli.soak"], "_MINUTE_S", float(seconds))
        before = counter(server, "checked_steps", label="")
        output = tmp_path / "soak.json"
        target = ("--url", server.url, "--constructed", "--model", MODEL)
        load = ("--minutes", "1", "--concurrency", "6", "--longest", "6000", "--seed", "3")
        result = CliRunner().invoke(app, ["soak", *target, *load, "--output", str(output)])
        assert result.exit_code == 0, result.output
        (minute,) = checked("soak", output.read_text())["minutes"]
        assert minute["verdicts"]["right"] > 5
        assert minute["verdicts"]["refused"] > 0
        assert minute["used_when_idle"] == 0
        # the server runs with M3_PLUGIN_CHECK=1, and found nothing
        assert counter(server, "checked_steps", label="") > before

    def test_a_client_of_single_bytes_holds_nobody_up(
        self, server: ServerProcess, client: OpenAI
    ) -> None:
        prompt = needle_prompt(721, num_tokens=1400)
        body = json.dumps({"model": MODEL, "messages": prompt.messages(), "max_tokens": 9}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection((LOOPBACK, server.port)) as slow:
            for byte in head.encode() + b"content-type: application/json\r\n\r\n" + body[:40]:
                slow.send(bytes([byte]))
            reply = ask(client, prompt.messages(), prompt.max_tokens)
            assert reply.choices[0].message.content == prompt.expected_text
            # what comes late is served as any other
            slow.sendall(body[40:])
            assert slow.recv(12) == b"HTTP/1.1 200"

    @pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.extended)])
    def test_a_worker_that_stands_still_for_a_while(
        self, server: ServerProcess, client: OpenAI, seconds: int
    ) -> None:
        (worker,) = processes_named(server, self.worker)
        right, wait = asked_meanwhile(client, range(722, 725), tokens=3000)
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        wait()
        assert right == [True] * 3

    @pytest.mark.extended
    @pytest.mark.timeout(3000)
    @pytest.mark.parametrize("repeats", [200])
    def test_one_prompt_on_other_pages_every_time_gives_the_same_bits(
        self, client: OpenAI, repeats: int
    ) -> None:
        """Alone in its steps, its prefix forgotten, and between two times its pages are others'."""
        prompt = needle_prompt(730, num_tokens=1800)
        found = set()
        for number in range(repeats):
            if number % 4 == 0:
                other = needle_prompt(731 + number, num_tokens=1400 + number % 7 * 500)
                ask(client, other.messages(), other.max_tokens)
            messages: Any = prompt.messages()
            reply: Any = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=prompt.max_tokens,
                temperature=0,
                logprobs=True,
                extra_body=NO_THINKING | {"cache_salt": f"time {number}"},
            )
            (choice,) = reply.choices
            assert choice.message.content == prompt.expected_text
            cached = reply.usage.prompt_tokens_details
            assert not (cached and cached.cached_tokens)
            found.add(tuple(token.logprob for token in choice.logprobs.content))
        assert len(found) == 1

    @pytest.mark.extended
    @pytest.mark.timeout(3000)
    @pytest.mark.parametrize("repeats", [40])
    def test_one_prompt_again_and_again_beside_others(self, client: OpenAI, repeats: int) -> None:
        """One answer. Hosts' own products round by the number of rows, and cached prefixes change
        that: log-probabilities agree to the rounding of fp32."""
        prompt = needle_prompt(730, num_tokens=1800)
        ended = threading.Event()

        def churn() -> None:
            for seed in itertools.count(731):
                if ended.is_set():
                    return
                other = needle_prompt(seed, num_tokens=1400 + seed % 7 * 500)
                ask(client, other.messages(), other.max_tokens)

        others = [threading.Thread(target=churn) for _ in range(2)]
        for other in others:
            other.start()
        try:
            logprobs = []
            for _ in range(repeats):
                reply = ask(client, prompt.messages(), prompt.max_tokens, logprobs=True)
                (choice,) = reply.choices
                assert choice.message.content == prompt.expected_text
                logprobs.append([token.logprob for token in choice.logprobs.content])
        finally:
            ended.set()
            for other in others:
                other.join()
        for found in logprobs:
            assert found == pytest.approx(logprobs[0], abs=1e-4)

    def test_greedy_replies_are_those_of_every_host(self, server: ServerProcess) -> None:
        """The same seed asks the same; all tokens behind the known answer are compared as well."""
        known = {int(number): text for number, text in json.loads(GREEDY.read_text()).items()}
        assert {number: greedy_reply(server.url, number) for number in known} == known

    def test_plain_text_is_asked_of_any_server_and_replayed(
        self, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """These weights know no prose: what they say is wrong, and no question of it is refused."""
        monkeypatch.setattr(sys.modules["m3_plugin.cli.soak"], "_MINUTE_S", 1.0)
        output = tmp_path / "soak.json"
        target = ("--url", server.url, "--model", MODEL)
        load = ("--minutes", "1", "--concurrency", "2", "--longest", "2048", "--seed", "1")
        result = CliRunner().invoke(app, ["soak", *target, *load, "--output", str(output)])
        assert result.exit_code == 1, result.output
        found = checked("soak", output.read_text())
        assert found["settings"]["needles"] == "text"
        details = {fault["number"]: fault["detail"] for fault in found["faults"]}
        assert details
        assert all(detail.startswith("expected ") for detail in details.values()), details

        # the first of them alone says the same again
        fault = found["faults"][0] | {"beside": []}
        output.write_text(json.dumps(found | {"faults": [fault]}))
        again = CliRunner().invoke(app, ["soak", *target, "--replay", str(output), "--json"])
        assert again.exit_code == 1, again.output
        replayed = checked("soak", again.stdout)["faults"]
        assert {entry["number"] for entry in replayed} == {fault["number"]}
        assert {entry["detail"] for entry in replayed} == {fault["detail"]}
