"""Verdicts: what is right, rightly refused, wrong and lost; and what is never taken for right."""

from __future__ import annotations

import json

import pytest

from m3_plugin.soak.judging import Model, Reply, body_of, is_streamed, judge
from m3_plugin.soak.mixture import BEYOND, MALFORMED, ROUND, Kind, Mixture, Request
from m3_plugin.soak.needles import LONG_ANSWER, ConstructedNeedles, Prompt

MODEL = Model("m3", 8192)
PROMPT = Prompt("question", "cedar oak gold", exact=True, max_tokens=4, pattern="( [a-z]+)+")


def request(kind: Kind = "chain", **more: object) -> Request:
    return Request(number=0, kind=kind, prompt=1, tokens=100, **more)  # type: ignore[arg-type]


def reply(*said: str, status: int = 200, **more: object) -> Reply:
    return Reply(status=status, said=dict(enumerate(said)), finished=True, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "got", "verdict"),
    [
        (request(), reply(" cedar oak gold"), "right"),
        (request(), reply(" cedar oak"), "wrong"),
        (request(), reply(" cedar oak gold gold"), "wrong"),
        (request(), reply(""), "wrong"),
        (request(), reply(), "wrong"),
        (request(), reply(status=400, reason="busy"), "wrong"),
        (request(), reply(status=500, reason="broken"), "lost"),
        (request(), Reply(reason="ConnectError: refused"), "lost"),
        (request(), Reply(status=200, said={0: " cedar oak gold"}), "lost"),
        (request("several", answers=2), reply(*[" cedar oak gold"] * 2), "right"),
        (request("several", answers=2), reply(" cedar oak gold"), "wrong"),
        (request("several", answers=2), reply(" cedar oak gold", " cedar"), "wrong"),
        (request("long"), reply(" cedar oak gold the the"), "right"),
        (request("long"), reply(" cedar the the"), "wrong"),
        (
            request("long"),
            reply(" cedar oak gold", usage={"completion_tokens": LONG_ANSWER - 1}),
            "wrong",
        ),
        (request("abort"), Reply(status=200, said={0: " cedar"}, left=True), "left"),
        (request("abort"), Reply(left=True), "left"),
        (request("abort"), Reply(status=200, said={0: " oak"}, left=True), "wrong"),
        (request("reset"), reply(), "right"),
        (request("reset"), reply(status=400, reason="requests run"), "refused"),
        (request("reset"), reply(status=500), "lost"),
        (request("beyond", variant="prompt"), reply("x"), "wrong"),
        (request("beyond", variant="prompt"), reply(status=400, reason="no"), "wrong"),
        (request("beyond", variant="prompt"), reply(status=400, reason="too long"), "refused"),
        (request("beyond", variant="prompt"), reply(status=500, reason="too long"), "lost"),
        (request("malformed", variant="cut"), reply(status=400), "wrong"),
        (request("malformed", variant="cut"), reply(status=400, reason="bad JSON"), "refused"),
    ],
)
def test_verdicts(asked: Request, got: Reply, verdict: str) -> None:
    prompt = None if asked.must_be_refused or asked.kind == "reset" else PROMPT
    found, detail = judge(asked, prompt, got)
    assert found == verdict
    assert bool(detail) == (verdict in ("wrong", "lost"))


def test_what_must_merely_be_said_must_be_said() -> None:
    """As of real weights, by the end of a long answer too; who left may have missed it."""
    prompt = Prompt("question", "4711", exact=False, max_tokens=8, pattern="[0-9]+")
    for kind in ("chain", "long"):
        assert judge(request(kind), prompt, reply("It is 4711, as told.")) == ("right", "")
        assert judge(request(kind), prompt, reply("I do not know."))[0] == "wrong"
    assert judge(request("abort"), prompt, reply("I do", left=True)) == ("left", "")


def test_bodies() -> None:
    needles = ConstructedNeedles()
    for asked in Mixture(3, 4096).first(2 * ROUND):
        if asked.must_be_refused or asked.kind == "reset":
            continue
        prompt = needles.prompt(asked)
        body = json.loads(body_of(asked, prompt, MODEL))
        assert body["model"] == "m3"
        assert body["stream"] == is_streamed(asked)
        assert body.get("n", 1) == asked.answers
        # a seed goes with what is sampled, and only greedy answers are bound to be the same
        assert ("seed" in body) == (body["temperature"] > 0)
        assert ("regex" in body) == (asked.kind == "structured")


@pytest.mark.parametrize("variant", [*BEYOND, *MALFORMED])
def test_bodies_that_no_server_may_accept(variant: str) -> None:
    kind: Kind = "beyond" if variant in BEYOND else "malformed"
    body = body_of(request(kind, variant=variant), None, MODEL)
    if variant == "cut":
        with pytest.raises(ValueError, match="Unterminated"):
            json.loads(body)
    else:
        assert json.loads(body)["model"] == "m3"
