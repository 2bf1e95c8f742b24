"""Special tokens typed into a chat are text: no place of a picture, no role, no end of a turn.

A tokenizer makes one id of "]<]image[>[" wherever it stands, so a chat template cannot tell its own
markers from those that somebody wrote into a message. What a request says is therefore cut inside
every added token before a host's template sees it: `CUT` marks the place, and the rendered prompt
is tokenized piece by piece (`encode_cut`). The ids are those of ordinary text and decode to what
was typed, to the letter; nothing is replaced, and a prompt without typed markers is not touched.

    "what is ]<]image[>[?"  ->  "what is ]" CUT "<]image[>[?"  ->  ids of "what is ]", "<]image[>[?"

A template's own text may complete a token ("]<]image[>" before "[e~["), so a text that ends with
the beginning of one is cut there too.

An assistant's own words keep the markers of thoughts and tool calls, which are added tokens but not
special ones: without a host's parsers they are in the content that clients must send back. They
move no picture and forge no role. Everything else that a request carries loses them too.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["CUT", "TypedTokens", "encode_cut", "without_cuts"]

# Noncharacters, which no text may hold, and another sequence in every process: nobody can type it.
CUT = "".join(chr(0xFDD0 + secrets.randbelow(16)) for _ in range(16))
# Characters of a token with which a text may not end: one alone needs a rest that no template has.
_LEAST_PART = 2
# Levels of JSON; Python's own stack has room for some three hundred.
_MAX_DEPTH = 100
# Parts of a message's content, and what in them is text.
_TEXTS_OF_PARTS = ("text", "refusal", "thinking")


class TypedTokens:
    """Cuts a tokenizer's added tokens wherever a request has them as text.

    Parameters
    ----------
    added : texts of the tokenizer's added tokens, and whether each is a special one
    ids : their ids

    All methods raise ValueError for JSON that is nested too deeply.
    """

    def __init__(self, added: Mapping[str, bool], *, ids: Iterable[int] = ()) -> None:
        self._ids = frozenset(ids)
        # a token of one character cannot be cut, and begins none of M3's others
        tokens = [text for text in added if len(text) > 1]
        special = [text for text in tokens if added[text]]
        self._all = _Cutter(tokens, tags=special)
        self._special = _Cutter(special, tags=special)

    @classmethod
    def of(cls, tokenizer: Any) -> TypedTokens:
        """Read from transformers' tokenizer."""
        added = tokenizer.added_tokens_decoder
        return cls({token.content: token.special for token in added.values()}, ids=added)

    def messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A chat's messages, every text of them cut; media are as they were."""
        return [self._message(message) for message in messages]

    def values(self, value: Any) -> Any:
        """Any JSON, tools for example: all of its texts cut, and its keys."""
        return _everywhere(value, self._all)

    def text(self, text: str, *, of_assistant: bool = False) -> str:
        """One text, as a part of a prompt."""
        return (self._special if of_assistant else self._all)([text])[0]

    def hidden_in(self, text: str, ids: Iterable[int]) -> bool:
        """Whether the text of `ids` holds typed tokens: reading it would give other ids."""
        return self._all.count(text) != sum(token in self._ids for token in ids)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        cutter = self._special if message.get("role") == "assistant" else self._all
        cut = {}
        for name, value in message.items():
            if name == "content":
                cut[name] = _content(value, cutter)
            elif name == "tool_calls" and _is_sequence(value):
                cut[name] = [self._call(call) for call in value]
            else:
                cut[name] = _everywhere(value, self._all)
        return cut

    def _call(self, made: Any) -> Any:
        call: Any = _everywhere(made, self._all, but="arguments")
        if not isinstance(call, dict):
            return call
        function = call.get("function")
        for holder in (call, function):
            if isinstance(holder, dict) and "arguments" in holder:
                holder["arguments"] = self._arguments(holder["arguments"])
        return call

    def _arguments(self, arguments: Any) -> Any:
        """JSON as text is read first: its escapes hide tokens ("]\\u003c]image[>[")."""
        if not isinstance(arguments, str):
            return _everywhere(arguments, self._all)
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return self._all([arguments])[0]
        cut = _everywhere(read, self._all)
        return arguments if cut == read else json.dumps(cut, ensure_ascii=False)


class _Cutter:
    """Cuts some tokens: inside each, and where a text ends with the beginning of one.

    Parameters
    ----------
    tags : tokens that an argument's name must not become between the brackets of a template
    """

    def __init__(self, tokens: Sequence[str], *, tags: Sequence[str]) -> None:
        firsts: dict[str, list[str]] = {}
        for token in tokens:
            firsts.setdefault(token[0], []).append(re.escape(token[1:]))
        # looking ahead finds tokens that overlap as well
        self._begun = re.compile(
            "|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in firsts.items()) or r"(?!)"
        )
        self._heads = frozenset(t[:n] for t in tokens for n in range(_LEAST_PART, len(t)))
        self._longest = max(map(len, tokens), default=0)
        self._tags = frozenset(tags)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Texts that a template may write one behind the other, each with its cuts."""
        whole = "".join(texts)
        places = [match.end() for match in self._begun.finditer(whole)]
        sizes = range(_LEAST_PART, min(self._longest, len(whole) + 1))
        if any(whole[-size:] in self._heads for size in sizes):
            places.append(len(whole))
        if not places:
            return list(texts)
        cut: list[str] = []
        begin = 0
        waiting = iter(places)
        place = next(waiting, None)
        for number, text in enumerate(texts):
            pieces, done, end = [], 0, begin + len(text)
            last = number == len(texts) - 1
            while place is not None and (place < end or (last and place == end)):
                pieces.append(text[done : place - begin])
                done, place = place - begin, next(waiting, None)
            cut.append(CUT.join([*pieces, text[done:]]))
            begin = end
        return cut

    def count(self, text: str) -> int:
        """Tokens in a text, overlaps and all."""
        return sum(1 for _ in self._begun.finditer(text))

    def key(self, key: str) -> str:
        """The name of an argument, which templates write as a tag."""
        if f"<{key}>" in self._tags or f"</{key}>" in self._tags:
            return CUT + key
        return self([key])[0]


def _content(content: Any, cutter: _Cutter) -> Any:
    """A message's content: a text, or parts, of which those of text may touch."""
    if isinstance(content, str):
        return cutter([content])[0]
    if not _is_sequence(content):
        return content
    parts: list[Any] = []
    touching: list[tuple[int, str | None, str]] = []

    def write() -> None:
        for (at, name, _), text in zip(touching, cutter([t for *_, t in touching]), strict=True):
            parts[at] = text if name is None else {**parts[at], name: text}
        touching.clear()

    for part in content:
        parts.append(part)
        at = len(parts) - 1
        if isinstance(part, str):
            touching.append((at, None, part))
            continue
        names = _TEXTS_OF_PARTS if isinstance(part, Mapping) else ()
        texts = [(at, name, part[name]) for name in names if isinstance(part.get(name), str)]
        if not texts:
            write()
        touching += texts
    write()
    return parts


def _everywhere(value: Any, cutter: _Cutter, *, but: str | None = None, depth: int = 0) -> Any:
    """Every text of a JSON value cut, but that of the key `but`."""
    if isinstance(value, str):
        return cutter([value])[0]
    if depth > _MAX_DEPTH:
        raise ValueError(f"a chat's JSON must be nested at most {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {
            cutter.key(key) if isinstance(key, str) else key: (
                item if key == but else _everywhere(item, cutter, but=but, depth=depth + 1)
            )
            for key, item in value.items()
        }
    if _is_sequence(value):
        return [_everywhere(item, cutter, but=but, depth=depth + 1) for item in value]
    return value


def _is_sequence(value: Any) -> bool:
    """Lists, and the iterators that pydantic makes of them."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def encode_cut(text: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
    """Token ids of a rendered prompt: of its pieces between cuts, one behind the other."""
    return [token for piece in _pieces(text) for token in encode(piece)]


def _pieces(text: str) -> Iterator[str]:
    return (piece for piece in text.split(CUT) if piece)


def without_cuts(value: Any) -> Any:
    """A text or any JSON as it was before it was cut."""
    if isinstance(value, str):
        return value.replace(CUT, "")
    if isinstance(value, Mapping):
        return {without_cuts(key): without_cuts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_cuts(item) for item in value]
    return value
