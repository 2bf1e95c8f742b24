"""Prompts whose answers are known: for the constructed checkpoint, and in plain text for any M3."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from m3_plugin.soak.mixture import Request
from m3_plugin.testing.prompts import (
    COLOURS,
    colour_rgb,
    min_needle_tokens,
    needle_prompt,
    picture_prompt,
)
from m3_plugin.testing.vocabulary import VOCABULARY

_SIDE = 112
# Prompts so short need no selection: decoys would not fit, and dense attention answers right too.
_WITH_DECOYS = min_needle_tokens() + 64
# An answer that goes on has to take pages of its own.
LONG_ANSWER = 160


@dataclass(frozen=True)
class Prompt:
    """What a client says, and what must come back.

    Attributes
    ----------
    content : of the user's message
    expected : the answer
    exact : whether the answer must be all that is said; otherwise it must be said
    max_tokens : room for the answer
    pattern : regular expression that the right answer follows, for structured output
    """

    content: str | list[dict[str, Any]]
    expected: str
    exact: bool
    max_tokens: int
    pattern: str

    def is_right(self, said: str) -> bool:
        """Whether a whole answer is right."""
        if self.exact:
            return said.strip() == self.expected
        return self.expected.lower() in said.lower()

    def begins_right(self, said: str) -> bool:
        """Whether an answer that goes on, or was cut, can be the beginning of a right one."""
        if not self.exact:
            return True
        said = said.strip()
        return said.startswith(self.expected) or self.expected.startswith(said)


class Needles(Protocol):
    """Makes a request's prompt."""

    def prompt(self, request: Request) -> Prompt:
        """The prompt of a request that has a right answer."""
        ...


class ConstructedNeedles:
    """For the checkpoint with known answers: chains of facts, of which each hides in a block."""

    def prompt(self, request: Request) -> Prompt:
        """Exactly `request.tokens` tokens of text, or a picture or a video."""
        if request.kind == "picture":
            return _constructed_picture(request.prompt)
        if request.kind == "video":
            return _constructed_video(request.prompt)
        if request.kind == "prefix":
            return self._behind_a_prefix(request)
        return self._chain(request.prompt, request.tokens, tail=request.tail)

    def _chain(self, seed: int, tokens: int, *, tail: int) -> Prompt:
        needle = needle_prompt(seed, num_tokens=tokens, decoys=tokens >= _WITH_DECOYS)
        words = needle.expected_text.split()
        text = needle.text
        if tail:
            # the same text to the last word, which asks for a later link of the chain
            (asked,) = (word for word in VOCABULARY.keys if word.text.strip() == words[tail - 1])
            text = text.removesuffix(needle.question) + asked.question
        return Prompt(
            content=text,
            expected=" ".join(words[tail:]),
            exact=True,
            max_tokens=needle.max_tokens - tail,
            pattern="( [a-z]+)+",
        )

    def _behind_a_prefix(self, request: Request) -> Prompt:
        """Half of it is common to the group; facts and question are this request's own."""
        front = request.tokens // 2
        own = self._chain(
            request.prompt + request.tail, max(request.tokens - front, _WITH_DECOYS), tail=0
        )
        rng = random.Random(f"prefix {request.prompt}")
        words = "".join(rng.choices([*VOCABULARY.fillers, " ."], k=front))
        return Prompt(words + str(own.content), own.expected, True, own.max_tokens, own.pattern)


class TextNeedles:
    """For real weights: a number hidden in prose, and pictures of one colour.

    Parameters
    ----------
    question : (tokens, depth from 0 to 1, seed) -> text, expected answer, tokens of an answer. The
        same tokens and seed give the same prose, whatever the depth.
    """

    def __init__(self, question: Callable[[int, float, int], tuple[str, str, int]]) -> None:
        self._question = question

    def prompt(self, request: Request) -> Prompt:
        """About `request.tokens` tokens of text, or a picture or a video."""
        if request.kind in ("picture", "video"):
            colour = COLOURS[request.prompt % len(COLOURS)]
            asked = f"Which colour is this {request.kind}? Answer with one word."
            shown = picture_part(colour) if request.kind == "picture" else video_part(colour, 4)
            content = [shown, {"type": "text", "text": asked}]
            return Prompt(content, colour, False, 32, f"({'|'.join(COLOURS)})")
        depth = random.Random(f"depth {request.prompt}").random()
        if request.kind in ("tail", "prefix"):
            depth = 0.5 + 0.1 * request.tail
        text, expected, room = self._question(request.tokens, depth, request.prompt)
        return Prompt(text, expected, False, room, "[0-9]+")


def picture_part(colour: str) -> dict[str, Any]:
    """Part of a message: a picture of one of `COLOURS`."""
    return {"type": "image_url", "image_url": {"url": _picture_url(colour)}}


def video_part(colour: str, frames: int) -> dict[str, Any]:
    """Part of a message: a video of one of `COLOURS`, as the list of its frames.

    Both hosts take such lists as `data:video/jpeg`, so that no encoder of videos is needed.
    """
    url = "data:video/jpeg;base64," + ",".join([_encoded(colour, "JPEG")] * frames)
    return {"type": "video_url", "video_url": {"url": url}}


def _picture_url(colour: str) -> str:
    return "data:image/png;base64," + _encoded(colour, "PNG")


@lru_cache(maxsize=2 * len(COLOURS))
def _encoded(colour: str, form: str) -> str:
    """A picture of one colour in base64."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), colour_rgb(colour)).save(data, format=form)
    return base64.b64encode(data.getvalue()).decode()


def _constructed_picture(seed: int) -> Prompt:
    rng = random.Random(f"picture {seed}")
    colours = rng.sample(COLOURS, rng.choice((1, 2)))
    ask = rng.randrange(len(colours)) if len(colours) > 1 else None
    picture = picture_prompt(colours, ask=ask, seed=seed)
    shown = iter(colours)
    content: list[dict[str, Any]] = [
        picture_part(next(shown)) if part["type"] == "image" else dict(part)
        for part in picture.content
    ]
    return Prompt(content, picture.expected_text.strip(), True, picture.max_tokens, "( [a-z]+)+")


def _constructed_video(seed: int) -> Prompt:
    rng = random.Random(f"video {seed}")
    colour, frames = rng.choice(COLOURS), rng.randint(1, 6)
    asked = picture_prompt((colour,), modality="video", seed=seed)
    content: list[dict[str, Any]] = [
        video_part(colour, frames) if part["type"] == "video" else dict(part)
        for part in asked.content
    ]
    return Prompt(content, asked.expected_text.strip(), True, asked.max_tokens, "( [a-z]+)+")
