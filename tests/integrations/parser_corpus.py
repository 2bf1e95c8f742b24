"""What MiniMax-M3 may say, and what a client should get: one corpus for both hosts' parsers.

Parsers belong to the hosts. The expected replies follow from the model's own chat template, of
which parsing is the inverse, and from the types in a tool's schema. Where a host's release gives
something else, the difference is recorded with the case and with the releases that have it: it is
documented (docs/parsers.md), not patched, and a host that mends it fails the test until the record
is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

Thinking = Literal["enabled", "adaptive", "disabled"]
# How a reply reaches the parser: not streamed; streamed in one piece (what a step of speculative
# decoding may bring), by token, by character, or cut anywhere.
Mode = Literal["whole", "piece", "tokens", "characters", "random"]
STREAMED: tuple[Mode, ...] = ("piece", "tokens", "characters", "random")
MODES: tuple[Mode, ...] = ("whole", *STREAMED)

NAMESPACE = "]<]minimax[>["
THINK = "<mm:think>"
THINK_END = "</mm:think>"

_INTEGERS = {"type": "array", "items": {"type": "integer"}}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "limit": {"type": "integer"}},
                "required": ["word"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "plan",
            "description": "Plan a journey.",
            "parameters": {
                "type": "object",
                "properties": {
                    "legs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"to": {"type": "string"}, "hours": _INTEGERS},
                        },
                    },
                    "grid": {"type": "array", "items": _INTEGERS},
                    "options": {
                        "type": "object",
                        "properties": {
                            "fast": {"type": "boolean"},
                            "budget": {"type": "number"},
                            "tags": {"type": "array", "items": {"type": "string"}},
                        },
                    },
                },
            },
        },
    },
]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client gets.

    Attributes
    ----------
    calls : (name, arguments) of every tool call, in order; arguments that are no JSON stay text
    """

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """What some releases of a host give instead.

    Attributes
    ----------
    releases : as in a requirement, e.g. "==0.32.*"
    modes : ways of feeding that show it; others give the expected reply. Random cuts may give
        either, as they may or may not fall where it shows
    because : what the client gets instead, for the table in docs/parsers.md
    """

    host: Literal["vllm", "sglang"]
    releases: str
    modes: tuple[Mode, ...]
    reply: Reply
    because: str

    def concerns(self, host: str, release: str) -> bool:
        """Whether it is about this release of this host."""
        return host == self.host and release in SpecifierSet(self.releases, prereleases=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One generated text.

    Attributes
    ----------
    text : what the model says; with thinking enabled, the prompt has already opened the thought
    """

    name: str
    thinking: Thinking
    text: str
    expected: Reply
    deviations: tuple[Deviation, ...] = ()

    def allowed(self, host: str, release: str, mode: Mode) -> tuple[Reply, ...]:
        """The replies this release may give to this way of feeding: one, or for random cuts two."""
        deviating = [
            d.reply for d in self.deviations if d.concerns(host, release) and mode in d.modes
        ]
        if mode == "random":
            return (self.expected, *deviating)
        return tuple(deviating) or (self.expected,)

    def after_the_thought(self) -> Case:
        """The same without a word in the thought that the prompt has opened."""
        assert self.thinking == "enabled"
        assert not self.deviations
        text = self.text.partition(THINK_END)[2]
        return replace(self, text=text, expected=replace(self.expected, reasoning=""))


# Cases a server is made to say, too.
SPOKEN = ("call after a thought", "call after a prompted thought")
SPOKEN_BY_MATRIX = (
    "nested arrays and objects",
    "answer without a thought",
    "thought and answer",
    "stray end of a thought first",
    "two calls in a block",
    "tag never closed, then a good call",
)


@dataclass(frozen=True)
class Piece:
    """Text that arrives at once, and its tokens."""

    text: str
    token_ids: tuple[int, ...]


def by_token(tokenizer: Any, text: str) -> Iterator[Piece]:
    """One token per piece, as far as characters of several tokens allow.

    Parameters
    ----------
    tokenizer : of transformers, with `encode` and `decode`
    """
    held: list[int] = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        held.append(token_id)
        decoded = tokenizer.decode(held)
        if not decoded.endswith("\ufffd"):
            yield Piece(decoded, tuple(held))
            held = []


def cut(tokenizer: Any, text: str, places: Sequence[int]) -> Iterator[Piece]:
    """Cut at these character positions; a marker that is cut falls apart into bytes."""
    edges = [0, *sorted({place for place in places if 0 < place < len(text)}), len(text)]
    for start, end in pairwise(edges):
        part = text[start:end]
        yield Piece(part, tuple(tokenizer.encode(part, add_special_tokens=False)))


def element(tag: str, *inner: str) -> str:
    """A value with its tags, as the chat template renders it."""
    return f"{NAMESPACE}<{tag}>{''.join(inner)}{NAMESPACE}</{tag}>"


def items(*values: str) -> str:
    """The elements of an array."""
    return "".join(element("item", value) for value in values)


def invoke(name: str, *parameters: str) -> str:
    """One call."""
    return f'{NAMESPACE}<invoke name="{name}">{"".join(parameters)}{NAMESPACE}</invoke>\n'


def block(*invokes: str) -> str:
    """A block of calls."""
    return f"{NAMESPACE}<tool_call>\n{''.join(invokes)}{NAMESPACE}</tool_call>"


LOOK_UP = invoke("look_up", element("word", "amber"))
LOOKED_UP = ("look_up", {"word": "amber"})

# Calls that cannot be read, each followed by a good one in its case.
_WRONG_CLOSE = invoke("look_up", f"{NAMESPACE}<word>umber{NAMESPACE}</limit>")
_NO_CLOSE = invoke("look_up", f"{NAMESPACE}<word>umber")
_NO_OPEN = invoke("look_up", f"umber{NAMESPACE}</word>")
_CUT_SHORT = block(_NO_CLOSE).partition("er]")[0]
_CALLED_EMPTY = "the bad call is made too, without the parameters that could not be read"
_BOTH_CALLED = Reply(calls=(("look_up", {}), LOOKED_UP))


def _vllm(*, reply: Reply, because: str) -> Deviation:
    """What vLLM gives however it is fed."""
    return Deviation(host="vllm", releases="==0.32.*", modes=MODES, reply=reply, because=because)


def _sglang(*, modes: tuple[Mode, ...], reply: Reply, because: str) -> Deviation:
    """What every release of SGLang that knows the format gives."""
    releases = ">=0.5.22,<0.5.24"
    return Deviation(host="sglang", releases=releases, modes=modes, reply=reply, because=because)


def _unread(text: str) -> Deviation:
    because = "no call at all: the whole block is content"
    return _sglang(modes=("whole",), reply=Reply(content=text), because=because)


def _swallowing(bad: str) -> Deviation:
    """Everything behind the first value's tag, up to the end of that value in the good call."""
    text = bad + LOOK_UP
    tag = f"{NAMESPACE}<word>"
    word = text[text.index(tag) + len(tag) : text.index(f"{NAMESPACE}</word>")]
    return _sglang(
        modes=STREAMED,
        reply=Reply(calls=(("look_up", {"word": word}),)),
        because="one call whose string holds the rest up to the good call's value",
    )


_JOURNEY = invoke(
    "plan",
    element(
        "legs",
        items(
            element("to", "Ostend") + element("hours", items("1", "2")),
            element("to", "Bruges") + element("hours", items("3")),
        ),
    ),
    element("grid", items(items("1", "2"), items("3"))),
    element(
        "options",
        element("fast", "true"),
        element("budget", "12.5"),
        element("tags", items("sea", "rain")),
    ),
)
_PLANNED = (
    "plan",
    {
        "legs": [{"to": "Ostend", "hours": [1, 2]}, {"to": "Bruges", "hours": [3]}],
        "grid": [[1, 2], [3]],
        "options": {"fast": True, "budget": 12.5, "tags": ["sea", "rain"]},
    },
)

CASES: tuple[Case, ...] = (
    Case(
        name="answer without a thought",
        thinking="adaptive",
        text="Cedar, naïvely: 東京 🙂.",
        expected=Reply(content="Cedar, naïvely: 東京 🙂."),
    ),
    Case(
        name="thought and answer",
        thinking="adaptive",
        text=f"{THINK}It said cedar.\n{THINK_END}Cedar.",
        expected=Reply(reasoning="It said cedar.\n", content="Cedar."),
    ),
    Case(
        name="thought opened by the prompt",
        thinking="enabled",
        text=f"It said cedar.\n{THINK_END}Cedar.",
        expected=Reply(reasoning="It said cedar.\n", content="Cedar."),
    ),
    Case(
        name="no thinking",
        thinking="disabled",
        text="Cedar.",
        expected=Reply(content="Cedar."),
    ),
    Case(
        name="stray end of a thought first",
        thinking="adaptive",
        text=f"{THINK_END}Cedar.",
        expected=Reply(content="Cedar."),
        deviations=(
            _sglang(
                modes=("characters", "random"),
                reply=Reply(content=f"{THINK_END}Cedar."),
                because="the marker stays in the content if it arrives in pieces",
            ),
        ),
    ),
    Case(
        name="thought cut short",
        thinking="adaptive",
        text=f"{THINK}It said ce",
        expected=Reply(reasoning="It said ce"),
    ),
    Case(
        name="prompted thought cut short",
        thinking="enabled",
        text="It said ce",
        expected=Reply(reasoning="It said ce"),
    ),
    Case(
        name="marker quoted in the answer",
        thinking="enabled",
        text=f"Hm.{THINK_END}A thought ends with {THINK_END} there.",
        expected=Reply(reasoning="Hm.", content=f"A thought ends with {THINK_END} there."),
        deviations=(
            Deviation(
                host="sglang",
                releases=">=0.5.22,<0.5.24",
                modes=("random",),
                reply=Reply(reasoning="Hm.", content="A thought ends with there."),
                because="a marker that begins the second piece of an answer is lost, and white "
                "space before it",
            ),
            Deviation(
                host="sglang",
                releases=">=0.5.22,<0.5.24",
                modes=("random",),
                reply=Reply(reasoning="Hm.", content="A thought ends with  there."),
                because="the same, where that white space came with the piece before",
            ),
        ),
    ),
    Case(
        name="answer that ends like a marker begins",
        thinking="disabled",
        text="The signs are ]<]mini",
        expected=Reply(content="The signs are ]<]mini"),
        deviations=(
            Deviation(
                host="sglang",
                releases="==0.5.22",
                modes=STREAMED,
                reply=Reply(content="The signs are "),
                because="the end of the answer is held back and never sent",
            ),
        ),
    ),
    Case(
        name="call",
        thinking="disabled",
        text=block(LOOK_UP),
        expected=Reply(calls=(LOOKED_UP,)),
    ),
    Case(
        name="call after a thought",
        thinking="adaptive",
        text=f"{THINK}I must look.{THINK_END}{block(LOOK_UP)}",
        expected=Reply(reasoning="I must look.", calls=(LOOKED_UP,)),
    ),
    Case(
        name="call after a prompted thought",
        thinking="enabled",
        text=f"I must look.{THINK_END}{block(LOOK_UP)}",
        expected=Reply(reasoning="I must look.", calls=(LOOKED_UP,)),
    ),
    Case(
        name="thought, words and call",
        thinking="enabled",
        text=f"I must look.{THINK_END}Let me look.{block(LOOK_UP)}",
        expected=Reply(reasoning="I must look.", content="Let me look.", calls=(LOOKED_UP,)),
    ),
    Case(
        name="call that is only thought of",
        thinking="enabled",
        text=f"I could say {block(LOOK_UP)} but no.{THINK_END}Cedar.",
        expected=Reply(reasoning=f"I could say {block(LOOK_UP)} but no.", content="Cedar."),
    ),
    Case(
        name="two calls in a block",
        thinking="disabled",
        text=block(LOOK_UP, invoke("look_up", element("word", "cedar"), element("limit", "3"))),
        expected=Reply(calls=(LOOKED_UP, ("look_up", {"word": "cedar", "limit": 3}))),
    ),
    Case(
        name="two blocks",
        thinking="disabled",
        text=f"First.{block(LOOK_UP)}{block(LOOK_UP)}",
        expected=Reply(content="First.", calls=(LOOKED_UP, LOOKED_UP)),
    ),
    Case(
        name="nested arrays and objects",
        thinking="disabled",
        text=block(_JOURNEY),
        expected=Reply(calls=(_PLANNED,)),
    ),
    Case(
        name="empty array and empty object",
        thinking="disabled",
        text=block(invoke("plan", element("grid"), element("options"))),
        expected=Reply(calls=(("plan", {"grid": [], "options": {}}),)),
        deviations=(
            _sglang(
                modes=STREAMED,
                reply=Reply(calls=(("plan", {"grid": {}, "options": {}}),)),
                because="an empty array becomes an empty object",
            ),
        ),
    ),
    Case(
        name="call without parameters",
        thinking="disabled",
        text=block(invoke("plan")),
        expected=Reply(calls=(("plan", {}),)),
    ),
    Case(
        name="markup and quotes in a string",
        thinking="disabled",
        text=block(invoke("look_up", element("word", 'a "b" </word> \\n <c>\n ]<] é'))),
        expected=Reply(calls=(("look_up", {"word": 'a "b" </word> \\n <c>\n ]<] é'}),)),
    ),
    Case(
        name="spaces around strings",
        thinking="disabled",
        text=block(
            invoke("look_up", element("word", " amber\n")),
            invoke("plan", element("options", element("tags", items(" sea ")))),
        ),
        expected=Reply(
            calls=(("look_up", {"word": " amber\n"}), ("plan", {"options": {"tags": [" sea "]}}))
        ),
        deviations=(
            _sglang(
                modes=("whole",),
                reply=Reply(
                    calls=(
                        ("look_up", {"word": " amber"}),
                        ("plan", {"options": {"tags": [" sea"]}}),
                    )
                ),
                because="white space at the end of strings is lost",
            ),
            _sglang(
                modes=STREAMED,
                reply=Reply(
                    calls=(
                        ("look_up", {"word": " amber\n"}),
                        ("plan", {"options": {"tags": [" sea"]}}),
                    )
                ),
                because="the same, in strings inside of arrays and objects",
            ),
        ),
    ),
    Case(
        name="empty strings",
        thinking="disabled",
        text=block(
            invoke("look_up", element("word")),
            invoke("plan", element("options", element("tags", items("")))),
        ),
        expected=Reply(calls=(("look_up", {"word": ""}), ("plan", {"options": {"tags": [""]}}))),
        deviations=(
            _sglang(
                modes=("piece", "random"),
                reply=Reply(
                    calls=(("look_up", {"word": {}}), ("plan", {"options": {"tags": [""]}}))
                ),
                because="an empty string becomes an empty object if both its tags come at once",
            ),
        ),
    ),
    Case(
        name="string that looks like a number",
        thinking="disabled",
        text=block(invoke("look_up", element("word", "007"))),
        expected=Reply(calls=(("look_up", {"word": "007"}),)),
    ),
    Case(
        name="tag closed by another, then a good call",
        thinking="disabled",
        text=block(_WRONG_CLOSE, LOOK_UP),
        expected=Reply(calls=(LOOKED_UP,)),
        deviations=(
            _vllm(reply=_BOTH_CALLED, because=_CALLED_EMPTY),
            _unread(block(_WRONG_CLOSE, LOOK_UP)),
            _swallowing(_WRONG_CLOSE),
        ),
    ),
    Case(
        name="tag never closed, then a good call",
        thinking="disabled",
        text=block(_NO_CLOSE, LOOK_UP),
        expected=Reply(calls=(LOOKED_UP,)),
        deviations=(
            _vllm(reply=_BOTH_CALLED, because=_CALLED_EMPTY),
            _sglang(modes=("whole",), reply=_BOTH_CALLED, because=_CALLED_EMPTY),
            _swallowing(_NO_CLOSE),
        ),
    ),
    Case(
        name="call without a name, then a good call",
        thinking="disabled",
        text=block(f"{NAMESPACE}<invoke>{NAMESPACE}</invoke>\n", LOOK_UP),
        expected=Reply(calls=(LOOKED_UP,)),
    ),
    Case(
        name="first tag left out",
        thinking="disabled",
        text=block(_NO_OPEN, LOOK_UP),
        expected=Reply(calls=(LOOKED_UP,)),
        deviations=(
            _vllm(reply=_BOTH_CALLED, because=_CALLED_EMPTY),
            _unread(block(_NO_OPEN, LOOK_UP)),
            _sglang(
                modes=STREAMED,
                reply=Reply(calls=(("look_up", '{"/word": '),)),
                because="one call whose arguments are no JSON; the good call is lost",
            ),
        ),
    ),
    Case(
        name="call cut short",
        thinking="disabled",
        text=_CUT_SHORT,
        expected=Reply(),
        deviations=(
            _vllm(
                reply=Reply(calls=(("look_up", {}),)),
                because="a call that looks complete, without the parameter that was cut",
            ),
            _sglang(
                modes=("whole",),
                reply=Reply(content=_CUT_SHORT),
                because="the markup is content",
            ),
            _sglang(
                modes=STREAMED,
                reply=Reply(calls=(("look_up", '{"word": "umb'),)),
                because="a call with as much of its arguments as there was: no JSON",
            ),
        ),
    ),
)
