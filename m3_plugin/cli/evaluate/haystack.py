"""Questions about one fact in a long text: for the constructed checkpoint, and for real weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

_SENTENCES = (
    "The bakery on the corner opens before the first tram.",
    "Rain had washed the chalk from the pavement overnight.",
    "A heron stood at the weir and did not move for an hour.",
    "The clerk stamped every page twice and filed the third copy.",
    "Nobody remembered who had planted the pear tree behind the school.",
    "The ferry was late because of fog, and the passengers played cards.",
    "She sharpened the pencils, although nobody would write that day.",
    "In the attic they found maps of a coast that had since moved.",
    "The orchestra tuned to the oboe and waited for the lights.",
    "A delivery of bricks blocked the lane until noon.",
    "The recipe asked for cardamom, so they walked to the market.",
    "His bicycle had a bell that could be heard across the canal.",
    "The librarian kept a list of books that were never returned.",
    "Two dogs slept under the bench where the old men argued.",
    "The museum closed its east wing to repair the skylight.",
    "Wind turned the pages of the newspaper on the empty chair.",
    "The surveyor measured the field again and got another number.",
    "A train passed without stopping, and the platform shook a little.",
    "They painted the fence green, then decided on white after all.",
    "The lighthouse keeper wrote the weather down in three colours.",
)
_TOWNS = (
    "Arlen", "Brisco", "Calvet", "Dorning", "Elsmere", "Farlow", "Gravik", "Hollis",
    "Ibsted", "Jarvik", "Kestrel", "Lomond", "Marten", "Norwell", "Ostrava", "Penrith",
)  # fmt: skip
_SHORT, _LONG = 1_000, 6_000


@dataclass(frozen=True)
class Question:
    """One text, what is asked about it and what is right.

    Attributes
    ----------
    exact : whether the answer must be all that is said; otherwise it must be said
    depth : where the fact really stands, 0 at the beginning and 1 at the question
    dense : what a model says that reads every block, where that is something else
    """

    text: str
    expected: str
    exact: bool
    depth: float
    max_tokens: int
    dense: str | None = None

    def is_right(self, answer: str) -> bool:
        """Whether the model found the fact."""
        return answer.strip() == self.expected if self.exact else self.expected in answer


class Haystack(Protocol):
    """Makes questions of a wanted length."""

    def question(self, *, context: int, depth: float, seed: int) -> Question:
        """A question whose text has about `context` tokens."""
        ...


class ConstructedHaystack:
    """For the checkpoint with known answers: a dense model, or a wrong selection, answers wrong."""

    def question(self, *, context: int, depth: float, seed: int) -> Question:
        """Exactly `context` tokens.

        Raises
        ------
        ValueError : `context` is too short for a needle that only the right selection finds.
        """
        from m3_plugin.testing.prompts import needle_prompt

        prompt = needle_prompt(seed, num_tokens=context, hops=1, depth=depth)
        return Question(
            text=prompt.text,
            expected=prompt.expected_text.strip(),
            exact=True,
            depth=prompt.needle_positions[0] / context,
            max_tokens=prompt.max_tokens,
            dense=prompt.dense_answer.strip() if prompt.dense_answer else None,
        )


class TextHaystack:
    """For real weights: a number in plain English prose.

    Parameters
    ----------
    count_tokens : text -> tokens of a request with it; called twice, to learn how long prose is
    prose : the user's own text instead of ours; repeated if it is too short
    """

    def __init__(self, count_tokens: Callable[[str], int], *, prose: str | None = None) -> None:
        self.prose = prose
        short, long = (count_tokens(self._text(size, seed=0)) for size in (_SHORT, _LONG))
        if long <= short:
            raise ValueError(
                f"the server counts {short} tokens in {_SHORT} characters and {long} in {_LONG}; "
                "does it report usage.prompt_tokens?"
            )
        self.tokens_per_character = (long - short) / (_LONG - _SHORT)
        self.overhead = short - self.tokens_per_character * _SHORT

    def question(self, *, context: int, depth: float, seed: int) -> Question:
        """About `context` tokens, chat template and question included."""
        rng = random.Random(f"needle {seed} {context} {depth}")
        town, number = rng.choice(_TOWNS), rng.randint(1_000_000, 9_999_999)
        fact = f" The secret number of the town of {town} is {number}."
        ask = (
            f"\n\nWhat is the secret number of the town of {town}, as told in the text above? "
            "Answer with the number alone."
        )
        size = (context - self.overhead) / self.tokens_per_character - len(fact) - len(ask)
        text = self._text(max(int(size), 0), seed=seed)
        # facts stand between sentences
        ends = [0, *(i + 1 for i, letter in enumerate(text) if letter in ".!?"), len(text)]
        at = min(ends, key=lambda end: abs(end - depth * len(text)))
        return Question(
            text=text[:at] + fact + text[at:] + ask,
            expected=str(number),
            exact=False,
            depth=at / max(len(text), 1),
            max_tokens=32,
        )

    def _text(self, size: int, *, seed: int) -> str:
        if self.prose is not None:
            return (self.prose * (size // len(self.prose) + 1))[:size]
        rng = random.Random(seed)
        text = ""
        parts = []
        while size > 0:
            text = " ".join(rng.sample(_SENTENCES, len(_SENTENCES))) + " "
            parts.append(text[:size])
            size -= len(text)
        return "".join(parts)
