"""The clients, against a server that does everything wrong: over real HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from m3_plugin.soak.driver import Driver, Outcome
from m3_plugin.soak.judging import Model
from m3_plugin.soak.mixture import Kind, Mixture, Request
from m3_plugin.soak.needles import Prompt
from tests.plugin.soak.server import Behaviour, Handler, serving

PROMPT = Prompt("question", "cedar oak gold", exact=True, max_tokens=4, pattern="( [a-z]+)+")


class Fixed:
    """One prompt for all requests."""

    def prompt(self, request: Request) -> Prompt:
        return PROMPT


def right(handler: Handler, body: dict[str, Any]) -> None:
    handler.answer(body, PROMPT.expected)


def asked(behaviour: Behaviour, kind: Kind = "chain", number: int = 1, **more: Any) -> Outcome:
    """What the driver says of one request to a server that behaves so."""
    request = Request(number=number, kind=kind, prompt=1, tokens=100, **more)
    with serving(behaviour) as server:
        driver = driver_of(server.url)

        async def ask() -> Outcome:
            async with driver._http() as http:
                return await driver.ask(http, request)

        return asyncio.run(ask())


def driver_of(url: str, *, concurrency: int = 4, timeout_s: float = 2.0) -> Driver:
    return Driver(
        url,
        Model("m3", 8192),
        mixture=Mixture(0, 4096),
        needles=Fixed(),
        concurrency=concurrency,
        timeout_s=timeout_s,
        reset_path="/reset",
    )


@pytest.mark.parametrize("number", [1, 2], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("chain", {}),
        ("several", {"answers": 3, "temperature": 0.1}),
        ("slow", {"pause_s": 0.01}),
        ("dribble", {"pause_s": 0.01}),
        ("reset", {}),
    ],
)
def test_right_answers(kind: Kind, number: int, more: dict[str, Any]) -> None:
    outcome = asked(right, kind, number, **more)
    assert (outcome.verdict, outcome.detail) == ("right", "")
    if kind != "reset":
        assert outcome.prompt_tokens == 9
        assert outcome.first_s is not None
        assert outcome.first_s <= outcome.seconds


def hangs(handler: Handler, body: dict[str, Any]) -> None:
    handler.answer({**body, "stream": True}, "cedar oak gold " * 40, pause_s=0.1)


def dies(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.close()
    raise ConnectionError


@pytest.mark.parametrize(
    ("behaviour", "number", "verdict", "said"),
    [
        (lambda h, body: h.answer(body, "cedar oak"), 1, "wrong", "got 'cedar oak'"),
        (lambda h, body: h.answer(body, "cedar oak"), 2, "wrong", "got ' cedar oak'"),
        (lambda h, body: h.say(400, {"message": "busy"}), 1, "wrong", "refused with 400: busy"),
        (lambda h, body: h.say(503, {"detail": "full"}), 1, "lost", "full"),
        (lambda h, body: h.text(200, "<html>"), 1, "lost", "<html>"),
        (lambda h, body: h.stream({"choices": []}, end=False), 2, "lost", "has no end"),
        (lambda h, body: h.stream("{not JSON"), 2, "lost", "no answer of this protocol"),
        (lambda h, body: h.stream({"choices": [{}]}), 2, "lost", "no answer of this protocol"),
        (lambda h, body: h.say(200, {"choices": [7]}), 1, "lost", "no answer of this protocol"),
        (
            lambda h, body: h.stream({"error": {"message": "engine died"}}),
            2,
            "lost",
            "in the stream: engine died",
        ),
        (hangs, 2, "lost", "no end within 2 s"),
        (dies, 1, "lost", "RemoteProtocolError"),
    ],
    ids=[
        "wrong",
        "streamed",
        "4xx",
        "5xx",
        "no JSON",
        "no end",
        "event",
        "choice",
        "body",
        "error event",
        "hangs",
        "dies",
    ],
)
def test_faults(behaviour: Behaviour, number: int, verdict: str, said: str) -> None:
    outcome = asked(behaviour, number=number)
    assert outcome.verdict == verdict
    assert said in outcome.detail
    assert outcome.is_fault


def test_nobody_listens() -> None:
    driver = driver_of("http://127.0.0.1:9")
    (outcome,) = asyncio.run(driver.all_at_once((0,)))
    assert (outcome.verdict, outcome.status) == ("lost", 0)


def test_a_client_that_leaves_is_no_fault_if_what_it_heard_was_right() -> None:
    slowly = replace(PROMPT, expected="cedar oak gold").expected

    def speak(handler: Handler, body: dict[str, Any]) -> None:
        handler.answer(body, slowly, pause_s=0.5)

    outcome = asked(speak, "abort", leave_after_s=0.7)
    assert outcome.verdict == "left"
    # one that is done before it wanted to leave is judged as any other
    assert asked(right, "abort", leave_after_s=30.0).verdict == "right"
    assert asked(lambda h, body: h.answer(body, "x"), "abort", leave_after_s=30.0).is_fault


def test_a_dribbled_body_arrives_whole() -> None:
    heard: list[dict[str, Any]] = []

    def listen(handler: Handler, body: dict[str, Any]) -> None:
        heard.append(body)
        right(handler, body)

    assert asked(listen, "dribble", pause_s=0.001).verdict == "right"
    assert heard[0]["messages"][0]["content"] == "question"


def test_load_is_kept_up_and_stops_with_the_server() -> None:
    outcomes: list[Outcome] = []
    most = 0
    under_way = 0

    def count(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.02)
        under_way -= 1
        right(handler, body)

    with serving(count) as server:
        driver = driver_of(server.url, concurrency=4)
        following = asyncio.run(
            driver.drive(0.5, first=3, on_outcome=outcomes.append, alive=lambda: True)
        )
    assert sorted(outcome.number for outcome in outcomes) == list(range(3, following))
    assert 1 < most <= 4
    assert any(outcome.beside for outcome in outcomes)

    lost: list[Outcome] = []
    asyncio.run(
        driver_of("http://127.0.0.1:9").drive(
            30, first=0, on_outcome=lost.append, alive=lambda: False
        )
    )
    assert 1 <= len(lost) <= 4


def test_many_clients_at_once_are_not_held_back_by_the_pool() -> None:
    numbers = tuple(range(40, 60))
    with serving(right) as server:
        outcomes = asyncio.run(driver_of(server.url, concurrency=2).all_at_once(numbers))
    assert [outcome.number for outcome in outcomes] == list(numbers)
