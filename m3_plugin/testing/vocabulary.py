"""Words of the constructed checkpoint: their token ids and what each one means to the model.

Plain Python: prompts can be built and answers read without torch or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from m3_plugin.testing.hub_layout import MARKER_TOKENS, SPECIAL_TOKENS

# A word belongs to one class: kind 0 is looked up by the first sparse layer, kind 1 by the second,
# and in that layer only by the heads of one GQA group.
NUM_KINDS = 2
NUM_GROUPS = 4
NUM_CLASSES = NUM_KINDS * NUM_GROUPS
# Channels of a word's code: entries +1 and -1, the first always +1.
CODE_SIZE = 16
# Two codes agree in 6..10 places: |inner product| <= 4 of 16.
MAX_CODE_OVERLAP = 4

_NOUNS = """
amber anchor apple arrow aspen autumn badge badger bamboo banner barley barrel basil basket
beach beaver birch bison blossom boulder bramble brass bridge bronze brook bucket cabin cactus
camel candy canoe canvas canyon carbon castle cedar cellar chalk cherry chestnut cinder citrus
clover cobalt comet compass copper coral cotton coyote cradle crater cricket crystal cypress
daisy delta desert dolphin dragon ebony eagle echo elder elm ember engine falcon feather fern
fiddle finch flint forest fossil fountain fox galaxy garden garnet ginger glacier granite grape
hammer harbor harvest hazel heron hickory honey horizon indigo iris iron island ivory ivy
jasmine jasper jungle juniper kettle kite ladder lagoon lemon lily linen lion lotus lupine
magnet mango maple marble marsh meadow melon meteor mint moss moth mulberry needle nettle nickel
nutmeg oak oasis olive onion opal orbit orchid otter oyster paddle palm paper parrot peach
pebble pepper petal pine planet plum pocket pollen poplar prairie quartz quill rabbit raven reed
ribbon robin rocket saddle saffron sage salmon sandal satin shadow shell sierra spider spruce
squid statue summit sunset swallow thistle thunder tiger timber topaz tulip tundra turnip umber
valley vanilla velvet violet walnut walrus quiver
"""
_TREASURES = ("gold", "silver", "pearl", "ruby", "diamond", "emerald", "sapphire", "platinum")
_COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white", "black")
_ORDINALS = ("first", "second", "third", "fourth")

_FILLERS = """
the a an and or but so then when while where there here it this that was were is are had has with
without over under near behind beside into onto from toward across along before after again often
never always still once soon late early cold warm quiet loud bright dark small large old new
river road hill town house door window table market train boat wind rain snow cloud morning
evening night day people children farmer sailor walked waited slept sang worked talked looked
stood moved turned opened closed watched
"""
# Fillers too, but kept for the phrases of prompts.
_PHRASE_WORDS = ("note", "means", "question", "follow", "picture", "video", "colour")
_PUNCTUATION = (",", ".", ";", ":")

# To the index branch a block with a lantern outranks the searched one, one with a candle only the
# blocks without anything, and one with a mirror does the former if RoPE is forgotten.
LANTERN = " lantern"
CANDLE = " candle"
MIRROR = " mirror"
# What the model says when the searched block was not among the selected ones.
NOWHERE = " nowhere"
# The end of the generation prompt "]~b]ai\n" as one token.
ASSISTANT = "ai\n"


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word that can be looked up or be an answer.

    `text` has its leading space. `question_id` is the form with a question mark and `decoy_id` the
    capitalised one, which the main attention takes for the same key; None for words without them.
    """

    text: str
    kind: int
    group: int
    code: tuple[int, ...]
    id: int
    question_id: int | None = None
    decoy_id: int | None = None

    @property
    def class_index(self) -> int:
        return self.kind * NUM_GROUPS + self.group

    @property
    def question(self) -> str:
        return self.text + "?"

    @property
    def decoy(self) -> str:
        return " " + self.text.strip().capitalize()


@lru_cache(maxsize=1)
def codes() -> tuple[tuple[int, ...], ...]:
    """All codes, greedily: 64 sequences of +1 and -1 that agree in 6..10 of 16 places."""
    low, high = (CODE_SIZE - MAX_CODE_OVERLAP) // 2, (CODE_SIZE + MAX_CODE_OVERLAP) // 2
    found: list[int] = []
    for bits in range(1 << (CODE_SIZE - 1)):
        if all(low <= (bits ^ other).bit_count() <= high for other in found):
            found.append(bits)
    return tuple(
        tuple(1 - 2 * (bits >> i & 1) for i in reversed(range(CODE_SIZE))) for bits in found
    )


class Vocabulary:
    """Token ids of the constructed checkpoint; use the one instance `VOCABULARY`."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._next_code = [0] * NUM_CLASSES
        self.num_reserved = len(SPECIAL_TOKENS) + len(MARKER_TOKENS) + 256

        self.fillers = tuple(" " + word for word in _FILLERS.split())
        phrases = tuple(" " + word for word in (*_PHRASE_WORDS, *_PUNCTUATION))
        for text in (*self.fillers, *phrases):
            self._add(text)
        self.lantern_id = self._add(LANTERN)
        self.candle_id = self._add(CANDLE)
        self.mirror_id = self._add(MIRROR)
        self.nowhere_id = self._add(NOWHERE)
        self.assistant_id = self._add(ASSISTANT)

        self.keys = tuple(
            self._word(noun, i % NUM_CLASSES, key=True) for i, noun in enumerate(_NOUNS.split())
        )
        self.treasures = tuple(self._word(word, i) for i, word in enumerate(_TREASURES))
        self.colours = tuple(self._word(word, i) for i, word in enumerate(_COLOURS))
        # Kind 0, group 0: a picture is found by the first sparse layer; its ordinal by the second.
        self.picture = self._word("picture", 0, known=True, question=True)
        self.video_question_id = self._add(" video?")
        self.ordinals = tuple(self._word(word, NUM_GROUPS + 2, question=True) for word in _ORDINALS)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        return (*self.keys, *self.treasures, *self.colours, *self.ordinals)

    @property
    def texts(self) -> Sequence[str]:
        """Texts of the tokens behind the special ones, the markers and the 256 bytes."""
        return self._texts

    @property
    def size(self) -> int:
        return self.num_reserved + len(self._texts)

    def id_of(self, text: str) -> int:
        """Id of a token by its exact text."""
        try:
            return self._ids[text]
        except KeyError:
            raise KeyError(f"no token of the constructed vocabulary reads {text!r}") from None

    def text_of(self, token_id: int) -> str:
        """Text of a token that is not a single byte."""
        texts = (*SPECIAL_TOKENS, *MARKER_TOKENS)
        if token_id < len(texts):
            return texts[token_id]
        if token_id < self.num_reserved or token_id >= self.size:
            raise KeyError(f"token {token_id} is not a word of the constructed vocabulary")
        return self._texts[token_id - self.num_reserved]

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids = {text: i for i, text in enumerate((*SPECIAL_TOKENS, *MARKER_TOKENS))}
        return ids | {text: self.num_reserved + i for i, text in enumerate(self._texts)}

    def _add(self, text: str) -> int:
        if text in self._texts:
            raise ValueError(f"the vocabulary has {text!r} twice")
        self._texts.append(text)
        return self.num_reserved + len(self._texts) - 1

    def _code(self, class_index: int) -> tuple[int, ...]:
        self._next_code[class_index] += 1
        return codes()[self._next_code[class_index] - 1]

    def _word(
        self,
        noun: str,
        class_index: int,
        *,
        known: bool = False,
        key: bool = False,
        question: bool = False,
    ) -> Word:
        """A word; a `known` one has its plain form already, as a filler."""
        kind, group = divmod(class_index, NUM_GROUPS)
        plain = " " + noun
        return Word(
            text=plain,
            kind=kind,
            group=group,
            code=self._code(class_index),
            id=self.num_reserved + self._texts.index(plain) if known else self._add(plain),
            question_id=self._add(f" {noun}?") if key or question else None,
            decoy_id=self._add(" " + noun.capitalize()) if key else None,
        )


VOCABULARY = Vocabulary()

# Letters with a question mark stay one piece, so that a question is one token; the last blank
# before a word belongs to the word.
PATTERN = r" ?\p{L}+\?|ai\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
