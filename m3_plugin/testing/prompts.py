"""Prompts for the constructed checkpoint, with the answers it must and must not give.

Plain Python; positions are laid out so that every promise holds wherever block boundaries fall,
also behind the system turns of a chat template.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from m3_plugin.testing.hub_layout import EOS_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN
from m3_plugin.testing.vocabulary import (
    CANDLE,
    LANTERN,
    MIRROR,
    NOWHERE,
    NUM_CLASSES,
    NUM_GROUPS,
    NUM_KINDS,
    VOCABULARY,
    Word,
)

_BLOCK = 128
COLOURS = tuple(colour.text.strip() for colour in VOCABULARY.colours)


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt:
    """A long text with a chain of facts in it, and the first key of the chain as a question.

    Attributes
    ----------
    text, token_ids : the prompt; `text` tokenizes to exactly `token_ids`
    expected_ids, expected_text : the greedy answer, one word per hop; the ids end with eos
    dense_answer : what dense attention answers, or a selection one block too large; None without
        decoys. An error that begins at hop i gives the expected words before i and these from i on.
    lost_answer : the answer, from the hop whose block was not selected: " nowhere" and eos
    groups : per hop, (sparse layer - 1, GQA group) that has to find it
    needle_positions : per hop, position in `token_ids` of the word to be found
    decoy_positions, lantern_positions, candle_position, mirror_position : what else the selection
        sees
    """

    text: str
    token_ids: tuple[int, ...]
    question: str
    expected_ids: tuple[int, ...]
    expected_text: str
    dense_answer: str | None
    lost_answer: str
    groups: tuple[tuple[int, int], ...]
    needle_positions: tuple[int, ...]
    decoy_positions: tuple[int, ...]
    lantern_positions: tuple[int, ...]
    candle_position: int | None
    mirror_position: int | None

    @property
    def max_tokens(self) -> int:
        """Tokens to generate for the whole answer, eos included."""
        return len(self.expected_ids)

    def needle_blocks(self, offset: int = 0) -> tuple[int, ...]:
        """Block of each hop's fact when `offset` tokens, a chat template's say, come first."""
        return tuple((position + offset) // _BLOCK for position in self.needle_positions)

    def messages(self) -> list[dict[str, str]]:
        """The prompt as a chat request."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True, kw_only=True)
class PicturePrompt:
    """A question about the colour of pictures or videos of one colour each.

    `text` holds the placeholders for a completion request, `content` the parts of a chat message.
    `colours` are those of the pictures in order, `modality` says what they are.
    """

    text: str
    content: tuple[dict[str, str], ...]
    modality: str
    colours: tuple[str, ...]
    expected_text: str
    expected_ids: tuple[int, ...]

    @property
    def max_tokens(self) -> int:
        return len(self.expected_ids)

    def messages(self) -> list[dict[str, object]]:
        """The prompt as a chat message; parts of type image or video stand for the data."""
        return [{"role": "user", "content": [dict(part) for part in self.content]}]


def min_needle_tokens(*, hops: int = 4, topk_blocks: int = 4, decoys: bool = True) -> int:
    """Shortest prompt of these options."""
    zones = [len(zone) for zone in _plan_zones(_Chain.draw(0, hops), topk_blocks, decoys)]
    apart = _BLOCK if decoys else 0
    return sum(zones) + apart * len(zones) + len(_question(VOCABULARY.keys[0])) + _LEAD


def needle_prompt(
    seed: int = 0,
    *,
    num_tokens: int = 1536,
    hops: int = 4,
    topk_blocks: int = 4,
    decoys: bool = True,
    distractors: int | None = None,
    depth: float | None = None,
) -> NeedlePrompt:
    """A text of `num_tokens` tokens whose question needs `hops` look-ups in other blocks.

    Parameters
    ----------
    seed : the same arguments give the same prompt
    topk_blocks : of the checkpoint that will answer. With decoys exactly `topk_blocks - 2` blocks
        outrank the searched one, beside the local one: it is the last to be selected.
    decoys : facts with a capitalised key and a wrong value, stronger than the true ones for the
        main attention but next in rank for the selection. Without them any length will do, and
        dense attention gives the expected answer too.
    distractors : unrelated facts strewn about; by default one per 256 tokens, at most 40
    depth : where the first fact stands between the earliest (0) and the latest place (1) it can
        have, within 5 %; anywhere by default
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be within 0..1, got {depth}")
    chain = _Chain.draw(seed, hops)
    needed = min_needle_tokens(hops=hops, topk_blocks=topk_blocks, decoys=decoys)
    if num_tokens < needed:
        raise ValueError(
            f"num_tokens must be at least {needed} for hops={hops}, topk_blocks={topk_blocks}, "
            f"decoys={decoys}, got {num_tokens}"
        )
    rng = random.Random(f"needle {seed}")
    question = _question(chain.keys[0])
    # Marked tokens of two zones are a block apart, so no shift puts them into one block; the last
    # zone keeps as far from the question, whose block is always selected.
    apart = _BLOCK if decoys else 0
    slack = num_tokens - needed
    while True:
        zones = _plan_zones(chain, topk_blocks, decoys)
        # The candle stays in front: a first block that is forced must cost the fact its place.
        front = zones[:1] if decoys else []
        zones = front + rng.sample(zones[len(front) :], len(zones) - len(front))
        cuts = sorted(rng.randint(0, slack) for _ in zones)
        if (
            depth is not None
            and abs(_depth_of_first_fact(zones, cuts, slack, apart) - depth) > 0.05
        ):
            continue
        if not decoys:
            break
        mirror = next(i for i, zone in enumerate(zones) if zone[0][1] == "mirror")
        position = _LEAD + sum(len(z) + apart for z in zones[:mirror]) + cuts[mirror]
        if _mirror_is_dim(num_tokens - 1 - position, hops):
            break
    tokens: list[str] = []
    marks: dict[str, list[int]] = {}
    start = _LEAD
    for zone, cut in zip(zones, cuts, strict=True):
        tokens += _filler_text(rng, start + cut - len(tokens))
        for text, mark in zone:
            if mark:
                marks.setdefault(mark, []).append(len(tokens))
            tokens.append(text)
        start += len(zone) + apart
    tokens += _filler_text(rng, num_tokens - len(question) - len(tokens))
    count = min(num_tokens // 256, 40) if distractors is None else distractors
    _strew(rng, tokens, chain.unused, count)
    tokens += question

    answer = [word.text for word in chain.values]
    ids = VOCABULARY.id_of
    return NeedlePrompt(
        text="".join(tokens),
        token_ids=tuple(ids(text) for text in tokens),
        question=question[-1],
        expected_ids=(*(ids(text) for text in answer), ids(EOS_TOKEN)),
        expected_text="".join(answer),
        dense_answer="".join(word.text for word in chain.wrong_values) if decoys else None,
        lost_answer=NOWHERE,
        groups=tuple((key.kind, key.group) for key in chain.keys),
        needle_positions=tuple(marks[f"needle {i}"][0] for i in range(hops)),
        decoy_positions=tuple(marks.get("decoy", ())),
        lantern_positions=tuple(marks.get("lantern", ())),
        candle_position=marks["candle"][0] if decoys else None,
        mirror_position=marks["mirror"][0] if decoys else None,
    )


def first_block_prompt(
    seed: int = 0, *, num_tokens: int = 1536, hops: int = 4, topk_blocks: int = 5
) -> NeedlePrompt:
    """A text whose facts all stand in its first block, which no score would let in.

    As many blocks as there are places outrank it: only a model that always reads its first block
    answers, any other says " nowhere". The text must stand at the beginning, without a template.

    Parameters
    ----------
    seed, num_tokens, hops : as of `needle_prompt`
    topk_blocks : of the checkpoint that will answer
    """
    chain = _Chain.draw(seed, hops)
    rng = random.Random(f"first block {seed}")
    tokens = _filler_text(rng, _LEAD)
    positions = []
    for key, value in zip(chain.keys, chain.values, strict=True):
        fact = [text for text, _ in _fact(key.text, value.text)]
        positions.append(len(tokens) + fact.index(value.text))
        tokens += fact
    question = _question(chain.keys[0])
    lanterns = []
    for _ in range(topk_blocks - 1):
        # a lantern per block, from the one behind the first on
        tokens += _filler_text(rng, (len(tokens) // _BLOCK + 1) * _BLOCK + 1 - len(tokens))
        lanterns.append(len(tokens))
        tokens.append(LANTERN)
    needed = (len(tokens) // _BLOCK + 1) * _BLOCK + len(question)
    if len(tokens) > topk_blocks * _BLOCK or num_tokens < needed:
        raise ValueError(
            f"hops={hops} and num_tokens={num_tokens} must leave the facts within one block and "
            f"the question behind {needed} tokens"
        )
    tokens += _filler_text(rng, num_tokens - len(question) - len(tokens))
    tokens += question
    answer = [word.text for word in chain.values]
    ids = VOCABULARY.id_of
    return NeedlePrompt(
        text="".join(tokens),
        token_ids=tuple(ids(text) for text in tokens),
        question=question[-1],
        expected_ids=(*(ids(text) for text in answer), ids(EOS_TOKEN)),
        expected_text="".join(answer),
        dense_answer=None,
        lost_answer=NOWHERE,
        groups=tuple((key.kind, key.group) for key in chain.keys),
        needle_positions=tuple(positions),
        decoy_positions=(),
        lantern_positions=tuple(lanterns),
        candle_position=None,
        mirror_position=None,
    )


def picture_prompt(
    colours: Sequence[str] = ("red",),
    *,
    ask: int | None = None,
    modality: str = "image",
    num_filler_tokens: int = 24,
    seed: int = 0,
) -> PicturePrompt:
    """A question about the colour of one of up to four pictures (or videos) of one colour each.

    Parameters
    ----------
    colours : one of `COLOURS` per picture, in order; draw them with `picture` or yourself
    ask : which picture the question is about, from 0; default the only one. All placeholders must
        lie within 500 tokens if there are several: "nearest label" is measured by a phase.
    num_filler_tokens : words between the pictures and the question
    """
    for colour in colours:
        if colour not in COLOURS:
            raise ValueError(f"colours must be among {', '.join(COLOURS)}, got {colour!r}")
    if not 1 <= len(colours) <= len(VOCABULARY.ordinals):
        raise ValueError(f"between 1 and 4 pictures can be told apart, got {len(colours)}")
    if modality not in ("image", "video"):
        raise ValueError(f"modality must be image or video, got {modality!r}")
    if ask is None:
        if len(colours) > 1:
            raise ValueError("ask must name one of several pictures, from 0")
    elif not 0 <= ask < len(colours):
        raise ValueError(f"ask must be within 0..{len(colours) - 1}, got {ask}")

    rng = random.Random(f"picture {seed}")
    noun = " picture" if modality == "image" else " video"
    placeholder = IMAGE_TOKEN if modality == "image" else VIDEO_TOKEN
    content: list[dict[str, str]] = []
    text = ""
    for ordinal, _ in zip(VOCABULARY.ordinals, colours, strict=False):
        words = "".join(_filler_text(rng, 4)) + ordinal.text + noun + " :"
        content += [{"type": "text", "text": words}, {"type": modality}]
        text += words + placeholder
    asked = noun + "?" if ask is None else VOCABULARY.ordinals[ask].question
    words = "".join(_filler_text(rng, num_filler_tokens)) + " question : the colour" + asked
    content.append({"type": "text", "text": words})
    answer = VOCABULARY.colours[COLOURS.index(colours[ask or 0])]
    return PicturePrompt(
        text=text + words,
        content=tuple(content),
        modality=modality,
        colours=tuple(colours),
        expected_text=answer.text,
        expected_ids=(answer.id, VOCABULARY.id_of(EOS_TOKEN)),
    )


_RGB = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}


def colour_rgb(colour: str) -> tuple[int, int, int]:
    """The 8-bit RGB value of one of `COLOURS`."""
    return _RGB[colour]


# Words before the first zone: the text never opens with a marked token.
_LEAD = 8


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """Words of one prompt: keys[i] means values[i]; decoys say it means wrong_values[i]."""

    keys: tuple[Word, ...]
    values: tuple[Word, ...]
    wrong_values: tuple[Word, ...]
    unused: tuple[Word, ...]

    @staticmethod
    def draw(seed: int, hops: int) -> _Chain:
        # One in four keys is kept for distractors.
        most = len(VOCABULARY.keys) * 3 // 8 // NUM_CLASSES * NUM_CLASSES
        if not 1 <= hops <= most:
            raise ValueError(f"hops must be within 1..{most}, got {hops}")
        rng = random.Random(f"chain {seed}")
        pools = [[w for w in VOCABULARY.keys if w.class_index == c] for c in range(NUM_CLASSES)]
        for pool in pools:
            rng.shuffle(pool)
        # Hops alternate between the two sparse layers and visit each GQA group every four hops.
        groups = [rng.sample(range(NUM_GROUPS), NUM_GROUPS) for _ in range(NUM_KINDS)]
        classes = [
            (i % NUM_KINDS) * NUM_GROUPS + groups[i % NUM_KINDS][(i // NUM_KINDS) % NUM_GROUPS]
            for i in range(hops)
        ]
        keys = [pools[c].pop() for c in classes]
        wrong = [pools[c].pop() for c in [*classes[1:], classes[0]]][: hops - 1]
        treasure, wrong_treasure = rng.sample(VOCABULARY.treasures, 2)
        return _Chain(
            keys=tuple(keys),
            values=(*keys[1:], treasure),
            wrong_values=(*wrong, wrong_treasure),
            unused=tuple(word for pool in pools for word in pool),
        )


# A token's text, and the name of what makes it special to the selection.
_Marked = tuple[str, str]


def _fact(key: str, value: str, mark: str = "") -> list[_Marked]:
    # Two words without a role stand before a key, or the value before would be its key.
    return [(t, "") for t in (" note", " :", key, " means")] + [(value, mark), (" .", "")]


def _plan_zones(chain: _Chain, topk_blocks: int, decoys: bool) -> list[list[_Marked]]:
    """Stretches of text of which each has to stay in blocks of its own."""
    facts = [
        _fact(key.text, value.text, f"needle {i}")
        for i, (key, value) in enumerate(zip(chain.keys, chain.values, strict=True))
    ]
    if not decoys:
        return facts
    lanterns: list[list[_Marked]] = [[(LANTERN, "lantern")] for _ in range(topk_blocks - 2)]
    # After a wrong answer the wrong chain goes on. Three times over: by the mean or sum of its
    # scores, instead of the largest, the decoys' block outranks the fact's.
    wrong = [
        fact
        for i, value in enumerate(chain.wrong_values)
        for fact in [
            _fact(chain.keys[i].decoy, value.text, "decoy"),
            *([_fact(chain.wrong_values[i - 1].decoy, value.text, "decoy")] if i else []),
        ]
    ]
    wrong_facts = [token for fact in wrong * 3 for token in fact]
    return [[(CANDLE, "candle")], [(MIRROR, "mirror")], wrong_facts, *lanterns, *facts]


def _depth_of_first_fact(
    zones: list[list[_Marked]], cuts: list[int], slack: int, apart: int
) -> float:
    """0 where the first fact has everything behind it, 1 where nothing but the question follows."""
    fact = next(i for i, zone in enumerate(zones) if any(mark == "needle 0" for _, mark in zone))
    before = sum(len(zone) + apart for zone in zones[:fact]) + cuts[fact]
    fixed = len(zones[0]) + apart if zones[0][0][1] == "candle" else 0
    most = slack + sum(len(zone) + apart for i, zone in enumerate(zones) if i != fact)
    return (before - fixed) / (most - fixed) if most > fixed else 0.0


# Answers come up to so many tokens after the question: the end of a generation prompt.
_MAX_SUFFIX = 16


def _mirror_is_dim(distance: int, hops: int) -> bool:
    """Whether a mirror `distance` tokens before the question stays below a candle for all hops."""
    return all(
        sum(math.cos(d * 5e6 ** (-pair / 32)) for pair in range(1, 11)) < 0.5 * 10
        for d in range(distance, distance + _MAX_SUFFIX + hops)
    )


def _question(key: Word) -> list[str]:
    return [" question", " :", " follow", key.question]


def _filler_text(rng: random.Random, count: int) -> list[str]:
    """`count` tokens of sentences that mean nothing to the model."""
    tokens: list[str] = []
    while len(tokens) < count:
        length = rng.randint(5, 11)
        tokens += [*rng.choices(VOCABULARY.fillers, k=length), " ."]
    return tokens[:count]


def _strew(rng: random.Random, tokens: list[str], words: Sequence[Word], count: int) -> None:
    """Replace filler by facts about `words`, at most one per word, in place."""
    fillers = {*VOCABULARY.fillers, " ."}
    keys = rng.sample(list(words), min(count, len(words) // 2))
    values = [word for word in words if word not in keys]
    for key in keys:
        fact = [text for text, _ in _fact(key.text, rng.choice(values).text)]
        for _ in range(20):
            at = rng.randint(_LEAD, len(tokens) - len(fact) - _LEAD)
            # Two more on either side, so that no two facts touch.
            if all(text in fillers for text in tokens[at - 2 : at + len(fact) + 2]):
                tokens[at : at + len(fact)] = fact
                break
