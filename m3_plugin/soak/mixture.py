"""What is asked: request n of a mixture is a pure function of its seed and n.

Nothing here knows a host, a clock or an answer, so the same seed asks the same on both hosts, a run
that was broken off goes on where it was, and one request can be asked again alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal[
    "chain",
    "same",
    "tail",
    "prefix",
    "picture",
    "video",
    "several",
    "sampled",
    "structured",
    "slow",
    "dribble",
    "abort",
    "long",
    "beyond",
    "malformed",
    "reset",
]

SHORTEST = 100
# Of the four hops of a chain, which one a question may begin with.
TAILS = 4
# Names of bodies that no server may accept; `judging` says by which words their refusal is known.
BEYOND = ("prompt", "answer", "pictures")
MALFORMED = ("cut", "no messages", "role", "temperature", "top_p", "picture", "type")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, before anybody has made words of it.

    Attributes
    ----------
    number : its place in the mixture
    prompt : seed of the prompt; requests of one group share it
    tokens : length of the prompt, about
    tail : for "tail" and "prefix" which of the group's members this is; else 0
    answers : how many answers are wanted, n
    temperature : 0 is greedy
    variant : name of a body that must be refused; "" for others
    pause_s : slow reader: between two events; dribble: between two parts of the body
    leave_after_s : abort: when the client goes away, counted from when it asked
    """

    number: int
    kind: Kind
    prompt: int
    tokens: int
    tail: int = 0
    answers: int = 1
    temperature: float = 0.0
    variant: str = ""
    pause_s: float = 0.0
    leave_after_s: float = 0.0

    @property
    def must_be_refused(self) -> bool:
        """Whether any answer but a 4xx is wrong."""
        return self.kind in ("beyond", "malformed")


@dataclass(frozen=True)
class Mixture:
    """All requests of one seed.

    Parameters
    ----------
    seed : of everything that is drawn
    longest : tokens of the longest prompt
    without : kinds that are left out, and replaced by plain chains
    """

    seed: int
    longest: int
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.longest <= SHORTEST:
            raise ValueError(f"longest must be above {SHORTEST} tokens; got {self.longest}")

    def request(self, number: int) -> Request:
        """Request `number`, from 0 on."""
        if number < 0:
            raise ValueError(f"number must not be negative; got {number}")
        turn, place = divmod(number, ROUND)
        return _turn(self.seed, self.longest, self.without, turn)[place]

    def first(self, count: int) -> Iterator[Request]:
        """The first `count` requests."""
        return (self.request(number) for number in range(count))


# A group is asked in a row, so that its members meet in the server. Sizes are fixed: the length of
# a round must not depend on what is drawn.
_GROUPS: tuple[tuple[Kind, int], ...] = (
    ("chain", 1),
    ("chain", 1),
    ("chain", 1),
    ("chain", 1),
    ("same", 5),
    ("tail", TAILS),
    ("prefix", 3),
    ("picture", 1),
    ("picture", 1),
    ("video", 1),
    ("several", 1),
    ("sampled", 1),
    ("sampled", 1),
    ("structured", 1),
    ("structured", 1),
    ("slow", 1),
    ("slow", 1),
    ("dribble", 1),
    ("abort", 1),
    ("abort", 1),
    ("abort", 1),
    ("abort", 1),
    ("long", 2),
    ("beyond", 1),
    ("beyond", 1),
    ("malformed", 1),
    ("malformed", 1),
    ("reset", 1),
)
ROUND = sum(size for _, size in _GROUPS)


@lru_cache(maxsize=64)
def _turn(seed: int, longest: int, without: frozenset[str], turn: int) -> tuple[Request, ...]:
    """One round: every group once, in an order of its own."""
    rng = random.Random(f"soak {seed} {turn}")
    groups = rng.sample(_GROUPS, len(_GROUPS))
    requests: list[Request] = []
    for kind, size in groups:
        prompt = rng.randrange(10**9)
        tokens = _log_uniform(rng, SHORTEST, longest)
        details = _DETAILS.get(kind, lambda rng: {})(rng)
        kept: Kind = "chain" if kind in without else kind
        for member in range(size):
            requests.append(
                Request(
                    number=turn * ROUND + len(requests),
                    kind=kept,
                    prompt=prompt,
                    tokens=tokens,
                    tail=member if kept in ("tail", "prefix") else 0,
                    **({} if kept != kind else details),
                )
            )
    return tuple(requests)


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


_DETAILS: dict[Kind, Callable[[random.Random], dict]] = {
    "several": lambda rng: {"answers": rng.randint(2, 4), "temperature": 0.1},
    "sampled": lambda rng: {"temperature": rng.choice((0.05, 0.1))},
    "slow": lambda rng: {"pause_s": rng.uniform(0.1, 1.0)},
    "dribble": lambda rng: {"pause_s": rng.uniform(0.05, 0.3)},
    "abort": lambda rng: {"leave_after_s": rng.uniform(0.01, 3.0)},
    "beyond": lambda rng: {"variant": rng.choice(BEYOND)},
    "malformed": lambda rng: {"variant": rng.choice(MALFORMED)},
}
