"""The parser corpus against a host's own parsers: whole, and streamed in every way.

A host's `test_parsers.py` derives `ParserCases` and says how its parsers are found and fed; its
`test_server.py` derives `SpokenCases`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from tests.integrations.parser_corpus import (
    CASES,
    SPOKEN,
    SPOKEN_BY_MATRIX,
    TOOLS,
    Case,
    Mode,
    Piece,
    Reply,
    Thinking,
    by_token,
    cut,
)
from tests.integrations.server import MODEL
from tests.integrations.tool_arguments import Call, calls, leaves, rendered

RANDOM_CUTS = 25
ROUND_TRIPS = 80


class ReplyParser(Protocol):
    """A host's parsers, as its server puts them together for one request."""

    def whole(self, text: str) -> Reply:
        """What a client gets that does not stream."""
        ...

    def stream(self, pieces: Iterable[Piece]) -> Reply:
        """All that a client gets while it streams, put together."""
        ...


class StreamedReply:
    """Puts together what a client is sent bit by bit, by the rules of the OpenAI protocol."""

    def __init__(self) -> None:
        self.reasoning = ""
        self.content = ""
        self._names: dict[int, str] = {}
        self._arguments: dict[int, str] = {}

    def call(self, index: int, name: str | None, arguments: str | None) -> None:
        """Part of a tool call: the name comes first and once, then pieces of the arguments."""
        if name is not None:
            assert index not in self._names, f"call {index} is named twice"
            self._names[index] = name
        assert index in self._names, f"arguments of call {index} before its name"
        self._arguments[index] = self._arguments.get(index, "") + (arguments or "")

    def reply(self) -> Reply:
        """What there is by now; indices must be 0, 1, ... in order."""
        assert list(self._names) == list(range(len(self._names)))
        calls = tuple(made_call(name, self._arguments[i]) for i, name in self._names.items())
        return Reply(reasoning=self.reasoning, content=self.content, calls=calls)


def made_call(name: str, arguments: str) -> tuple[str, Any]:
    """A call with its arguments decoded, if they can be."""
    try:
        return name, json.loads(arguments)
    except json.JSONDecodeError:
        return name, arguments


class ParserCases:
    """Derive, and say which host this is and how it parses."""

    host: ClassVar[str]
    release: ClassVar[str]

    @pytest.fixture(scope="class")
    def tokenizer(self, constructed_checkpoint: Path) -> Any:
        """M3's markers and special tokens over single bytes."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(constructed_checkpoint)

    def parser(
        self, thinking: Thinking, tokenizer: Any, tools: Sequence[dict[str, Any]] = TOOLS
    ) -> ReplyParser:
        """Fresh parsers for a request with this thinking mode and these tools."""
        raise NotImplementedError

    def keeps(self, value: Any, *, streamed: bool) -> bool:
        """Whether a single value survives; what does not is in the corpus, as a deviation."""
        return True

    def check(self, found: Reply, case: Case, mode: Mode) -> None:
        """Compare with the corpus; also fails if the host has mended what is recorded."""
        allowed = case.allowed(self.host, self.release, mode)
        if found not in allowed:
            pytest.fail(
                f"{self.host} {self.release}, {case.name}, {mode}:\n  text {case.text!r}\n"
                f"  gave {found}\n  corpus {allowed}\n  right {case.expected}"
            )

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_whole(self, case: Case, tokenizer: Any) -> None:
        self.check(self.parser(case.thinking, tokenizer).whole(case.text), case, "whole")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_streamed_in_one_piece(self, case: Case, tokenizer: Any) -> None:
        pieces = cut(tokenizer, case.text, ())
        self.check(self.parser(case.thinking, tokenizer).stream(pieces), case, "piece")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_streamed_by_token(self, case: Case, tokenizer: Any) -> None:
        pieces = list(by_token(tokenizer, case.text))
        assert "".join(piece.text for piece in pieces) == case.text
        self.check(self.parser(case.thinking, tokenizer).stream(pieces), case, "tokens")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_streamed_by_character(self, case: Case, tokenizer: Any) -> None:
        pieces = cut(tokenizer, case.text, range(len(case.text)))
        self.check(self.parser(case.thinking, tokenizer).stream(pieces), case, "characters")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_streamed_in_random_pieces(self, case: Case, tokenizer: Any) -> None:
        places = st.lists(st.integers(1, len(case.text) - 1), max_size=12)

        @settings(max_examples=RANDOM_CUTS, derandomize=True, deadline=None, database=None)
        @given(places)
        def stream(places: list[int]) -> None:
            pieces = cut(tokenizer, case.text, places)
            self.check(self.parser(case.thinking, tokenizer).stream(pieces), case, "random")

        stream()

    def test_arguments_come_back_as_they_were(self, tokenizer: Any) -> None:
        """Any nesting, rendered by the chat template: whole, and cut anywhere."""

        @settings(max_examples=ROUND_TRIPS, derandomize=True, deadline=None, database=None)
        @given(calls(), st.data())
        def there_and_back(call: Call, data: st.DataObject) -> None:
            text = rendered(tokenizer, call)
            expected = Reply(calls=((call.name, call.arguments),))
            for streamed in (False, True):
                if not all(self.keeps(v, streamed=streamed) for v in leaves(call.arguments)):
                    continue
                parser = self.parser("disabled", tokenizer, [call.tool])
                if streamed:
                    places = data.draw(st.lists(st.integers(1, len(text) - 1), max_size=12))
                    found = parser.stream(cut(tokenizer, text, places))
                else:
                    found = parser.whole(text)
                assert found == expected, text

        there_and_back()


class SpokenCases:
    """Some of the corpus through a running server, parsers, sampler, detokenizer and all.

    No test checkpoint says such texts by itself: the host's constrained decoding leaves it no other
    choice. Which tokens the text is made of stays the model's own choice. Derive beside
    `ServerCases`.
    """

    host: ClassVar[str]
    release: ClassVar[str]
    # whether a grammar binds the answer only: a prompted thought is then the model's own, and empty
    thinks_freely: ClassVar[bool] = False

    def saying(self, grammar: str) -> dict[str, Any]:
        """Fields of a request whose answer must follow this EBNF grammar."""
        raise NotImplementedError

    @pytest.fixture(
        params=[
            *SPOKEN,
            *(pytest.param(name, marks=pytest.mark.extended) for name in SPOKEN_BY_MATRIX),
        ]
    )
    def case(self, request: pytest.FixtureRequest) -> Case:
        return next(case for case in CASES if case.name == request.param)

    def test_spoken_replies_are_parsed(self, client: OpenAI, case: Case) -> None:
        if case.thinking == "enabled" and self.thinks_freely:
            case = case.after_the_thought()
        request: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "amber?"}],
            "tools": TOOLS,
            "temperature": 0,
            "max_tokens": len(case.text.encode()) + 8,
            "extra_body": {
                "chat_template_kwargs": {"thinking_mode": case.thinking},
                **self.saying(f"root ::= {json.dumps(case.text, ensure_ascii=False)}"),
            },
        }
        (choice,) = client.chat.completions.create(**request).choices
        message = choice.message
        calls = [call.function for call in message.tool_calls or () if call.type == "function"]
        whole = Reply(
            reasoning=reasoning_of(message),
            content=message.content or "",
            calls=tuple(made_call(call.name, call.arguments) for call in calls),
        )
        assert (whole,) == case.allowed(self.host, self.release, "whole")
        assert choice.finish_reason == ("tool_calls" if calls else "stop")

        got = StreamedReply()
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                got.reasoning += reasoning_of(choice.delta)
                got.content += choice.delta.content or ""
                for call in choice.delta.tool_calls or ():
                    if call.function is not None:
                        got.call(call.index, call.function.name, call.function.arguments)
        by_token, by_character = (
            case.allowed(self.host, self.release, mode) for mode in ("tokens", "characters")
        )
        assert got.reply() in by_token + by_character


def reasoning_of(message: Any) -> str:
    """The thought of a message or of its delta: the hosts name the field differently."""
    return getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""
