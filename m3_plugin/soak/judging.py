"""The body of a request, and the verdict on what came back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from m3_plugin.soak.mixture import Request
from m3_plugin.soak.needles import LONG_ANSWER, Prompt, picture_part

Verdict = Literal["right", "refused", "left", "wrong", "lost"]
# What no server may do once.
FAULTS: tuple[Verdict, ...] = ("wrong", "lost")

# One of these words must stand in the reason of a refusal.
_NAMED = {
    "prompt": ("length", "token", "context", "long"),
    "answer": ("length", "token", "context", "max"),
    "pictures": ("image", "picture"),
    "picture": ("image", "picture"),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "no messages": ("messages",),
    "role": ("role", "nobody"),
    "type": ("messages", "list", "iterable"),
    "cut": (),
}


@dataclass
class Reply:
    """What a client got.

    Attributes
    ----------
    status : of HTTP; 0 where there was none
    said : per answer, its text
    reason : of a refusal, or what went wrong on the way
    finished : whether the reply came to its proper end
    left : whether the client went away itself
    usage : prompt_tokens, completion_tokens, cached_tokens as the server counts them
    """

    status: int = 0
    said: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    finished: bool = False
    left: bool = False
    usage: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Of the server.

    Attributes
    ----------
    name : under which the server has it
    longest : tokens of prompt and answer together
    most_pictures : of one request
    """

    name: str
    longest: int
    most_pictures: int = 2


def body_of(request: Request, prompt: Prompt | None, model: Model) -> bytes:
    """What is posted to /v1/chat/completions.

    Parameters
    ----------
    prompt : of a request that has a right answer; None for those that must be refused
    """
    if request.must_be_refused:
        return _bad_body(request, model)
    assert prompt is not None
    body: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": prompt.content}],
        "max_tokens": LONG_ANSWER if request.kind == "long" else prompt.max_tokens,
        "temperature": request.temperature,
        "chat_template_kwargs": {"thinking_mode": "disabled"},
        "stream": is_streamed(request),
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if request.answers > 1:
        body["n"] = request.answers
    if request.temperature > 0:
        body["seed"] = request.prompt
    if request.kind == "long":
        body["ignore_eos"] = True
    if request.kind == "structured":
        # each host passes over the other's name for it
        body["structured_outputs"] = {"regex": prompt.pattern}
        body["regex"] = prompt.pattern
    return json.dumps(body).encode()


def is_streamed(request: Request) -> bool:
    """Whether the answer comes in pieces: always where that matters, else for every other one."""
    if request.must_be_refused:
        return False
    return request.kind in ("slow", "abort", "long") or request.number % 2 == 0


def _bad_body(request: Request, model: Model) -> bytes:
    word = {"role": "user", "content": "x"}
    good: dict[str, Any] = {"model": model.name, "messages": [word], "max_tokens": 4}
    pictures = [picture_part("red")] * (model.most_pictures + 1)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    bodies: Mapping[str, dict[str, Any]] = {
        "prompt": {**good, "messages": [{**word, "content": " the" * (model.longest + 64)}]},
        "answer": {**good, "max_tokens": model.longest + 1},
        "pictures": {**good, "messages": [{**word, "content": pictures}]},
        "no messages": {"model": model.name},
        "role": {**good, "messages": [{"role": "nobody", "content": 3}]},
        "temperature": {**good, "temperature": -1},
        "top_p": {**good, "top_p": 7},
        "picture": {**good, "messages": [{**word, "content": [broken]}]},
        "type": {**good, "messages": 7},
    }
    if request.variant == "cut":
        return json.dumps(good).encode()[:-9]
    return json.dumps(bodies[request.variant]).encode()


def judge(request: Request, prompt: Prompt | None, reply: Reply) -> tuple[Verdict, str]:
    """A verdict, and in words what is wrong; "" where nothing is."""
    if reply.left:
        said = "".join(reply.said.values())
        if prompt is None or prompt.begins_right(said):
            return "left", ""
        return "wrong", f"expected {prompt.expected!r}, heard {said!r} before leaving"
    if not reply.status or reply.status >= 500:
        return "lost", reply.reason or f"HTTP {reply.status}"
    if 400 <= reply.status < 500:
        return _judge_refusal(request, reply)
    if not reply.finished:
        return "lost", reply.reason or "the reply has no end"
    if request.must_be_refused:
        return "wrong", f"must be refused ({request.variant}), was answered with {reply.status}"
    if request.kind == "reset":
        return "right", ""
    assert prompt is not None
    if sorted(reply.said) != list(range(request.answers)):
        return "wrong", f"asked for {request.answers} answers, got {sorted(reply.said)}"
    for said in reply.said.values():
        # what must merely be said is said by then
        begins = request.kind == "long" and prompt.exact
        right = prompt.begins_right(said) if begins else prompt.is_right(said)
        if not right or not said:
            return "wrong", f"expected {prompt.expected!r}, got {said[:400]!r}"
    return _judge_counts(request, reply)


def _judge_refusal(request: Request, reply: Reply) -> tuple[Verdict, str]:
    if request.kind == "reset":
        # SGLang does not flush while requests run, and says so
        return "refused", ""
    if not request.must_be_refused:
        return "wrong", f"refused with {reply.status}: {reply.reason[:400]}"
    named: Sequence[str] = _NAMED[request.variant]
    if not reply.reason or (named and not any(word in reply.reason.lower() for word in named)):
        return "wrong", (
            f"{reply.status} for {request.variant!r} names none of {', '.join(named)}: "
            f"{reply.reason[:400]!r}"
        )
    return "refused", ""


def _judge_counts(request: Request, reply: Reply) -> tuple[Verdict, str]:
    """An answer that was told to go on must have gone on."""
    counted = reply.usage.get("completion_tokens")
    if request.kind == "long" and counted is not None and counted != LONG_ANSWER:
        return "wrong", f"asked for {LONG_ANSWER} tokens without an end, got {counted}"
    return "right", ""
