"""The mixture: the same seed asks the same, everywhere and for ever."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict
from typing import get_args

import pytest

from m3_plugin.soak.mixture import BEYOND, MALFORMED, ROUND, SHORTEST, Kind, Mixture
from m3_plugin.soak.needles import ConstructedNeedles, Prompt, TextNeedles
from m3_plugin.testing.hub_layout import EOS_TOKEN
from m3_plugin.testing.vocabulary import VOCABULARY

LONGEST = 8192


def test_a_seed_asks_the_same_for_ever() -> None:
    """A file of an earlier run is continued and replayed by its numbers."""
    told = repr([asdict(request) for request in Mixture(7, LONGEST).first(3 * ROUND)])
    assert hashlib.sha256(told.encode()).hexdigest() == DIGEST
    assert Mixture(8, LONGEST).request(0) != Mixture(7, LONGEST).request(0)


DIGEST = "6ddcc411e12de983b5fc99b1fd85c3fee940bc66144a4acabfeb5c485443a8b3"


def test_a_round_holds_every_kind_and_any_number_can_be_asked_alone() -> None:
    mixture = Mixture(0, LONGEST)
    requests = list(mixture.first(4 * ROUND))
    assert [request.number for request in requests] == list(range(4 * ROUND))
    counts = Counter(request.kind for request in requests)
    assert set(counts) == set(get_args(Kind))
    assert all(count % 4 == 0 for count in counts.values())
    assert Mixture(0, LONGEST).request(3 * ROUND + 5) == requests[3 * ROUND + 5]
    assert min(request.tokens for request in requests) < 2 * SHORTEST
    assert LONGEST / 2 < max(request.tokens for request in requests) <= LONGEST


def test_all_variants_come_up() -> None:
    requests = list(Mixture(0, LONGEST).first(40 * ROUND))
    for kind, variants in (("beyond", BEYOND), ("malformed", MALFORMED)):
        assert {r.variant for r in requests if r.kind == kind} == set(variants)


def test_kinds_can_be_left_out_without_moving_the_others() -> None:
    with_resets = Mixture(0, LONGEST).first(2 * ROUND)
    without = Mixture(0, LONGEST, frozenset({"reset"})).first(2 * ROUND)
    for one, other in zip(with_resets, without, strict=True):
        assert other.kind == ("chain" if one.kind == "reset" else one.kind)
        assert (one.number, one.prompt, one.tokens) == (other.number, other.prompt, other.tokens)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="longest must be above 100 tokens; got 100"):
        Mixture(0, 100)
    with pytest.raises(ValueError, match="number must not be negative; got -1"):
        Mixture(0, LONGEST).request(-1)


def tokens_of(prompt: Prompt) -> list[int]:
    """Ids of a text, token by token: the vocabulary has one for each word."""
    assert isinstance(prompt.content, str)
    pieces = prompt.content.split(" ")
    return [VOCABULARY.id_of(f" {piece}") for piece in pieces if piece]


def prompts(kind: Kind) -> list[Prompt]:
    needles = ConstructedNeedles()
    found = [r for r in Mixture(1, LONGEST).first(2 * ROUND) if r.kind == kind]
    return [needles.prompt(request) for request in found]


def test_members_of_a_group_share_what_they_should() -> None:
    same = prompts("same")[:5]
    assert len({str(prompt.content) for prompt in same}) == 1
    tails = prompts("tail")[:4]
    words = [prompt.expected.split() for prompt in tails]
    # one chain, each time from a later link on, and texts that differ in the last token alone
    assert words == [words[0][i:] for i in range(4)]
    assert len({tuple(tokens_of(prompt)[:-1]) for prompt in tails}) == 1
    fronts = [tokens_of(prompt) for prompt in prompts("prefix")[:3]]
    shared = sum(len(set(column)) == 1 for column in zip(*fronts, strict=False))
    assert shared >= min(map(len, fronts)) // 4
    assert len({tuple(front) for front in fronts}) == 3


def test_lengths_are_those_of_the_request() -> None:
    needles = ConstructedNeedles()
    for request in Mixture(2, LONGEST).first(ROUND):
        if request.kind in ("chain", "same", "tail", "sampled"):
            assert len(tokens_of(needles.prompt(request))) == request.tokens


def test_the_pattern_of_an_answer_fits_it() -> None:
    for kind in ("structured", "picture", "video"):
        for prompt in prompts(kind):
            assert EOS_TOKEN not in prompt.expected
            assert set(prompt.expected) <= {*"abcdefghijklmnopqrstuvwxyz "}


def test_plain_text_for_any_server() -> None:
    asked = []

    def question(tokens: int, depth: float, seed: int) -> tuple[str, str, int]:
        asked.append((tokens, depth, seed))
        return f"text of {tokens}", str(seed), 32

    needles = TextNeedles(question)
    mixture = Mixture(0, LONGEST)
    tails = [request for request in mixture.first(ROUND) if request.kind == "tail"]
    found = [needles.prompt(request) for request in tails]
    assert len({(tokens, seed) for tokens, _, seed in asked}) == 1
    assert len({depth for _, depth, _ in asked}) == len(tails)
    assert found[0].is_right(f"It is {tails[0].prompt}.")
    assert not found[0].is_right("It is 7.")
    for kind in ("picture", "video"):
        (shown, *_) = (r for r in mixture.first(ROUND) if r.kind == kind)
        assert needles.prompt(shown).is_right(f"{needles.prompt(shown).expected.capitalize()}.")
