"""Tools with arguments of any shape, drawn at random, and the text in which a model calls them.

The text is what the chat template makes of the call when the conversation goes on, of which parsing
is the inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.integrations.parser_corpus import NAMESPACE

_END_OF_TURN = "[e~[\n"
_ANSWER = "]~b]ai\n</mm:think>"


@dataclass(frozen=True)
class Call:
    """One call of a tool made for it.

    Attributes
    ----------
    tool : as in a request's `tools`
    arguments : follow the tool's schema
    """

    tool: dict[str, Any]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.tool["function"]["name"]


def rendered(tokenizer: Any, call: Call) -> str:
    """What the model says to make the call, thinking disabled.

    Parameters
    ----------
    tokenizer : of transformers, with the checkpoint's chat template
    """
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        {"role": "user", "content": "amber?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[call.tool], tokenize=False)
    return text.rpartition(_ANSWER)[2].removesuffix(_END_OF_TURN)


def leaves(value: Any) -> Iterator[Any]:
    """Every value that has none inside: scalars, empty arrays and empty objects."""
    if isinstance(value, dict | list) and value:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


# Letters of every script, and pieces of the markup itself, short of its marker.
_PIECES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    st.sampled_from(["</item>", "<to>", "]<]", "[>[", '"', "\\n", "\n", "{}", "[1, 2]", "null"]),
)
_STRINGS = st.lists(_PIECES, max_size=3).map("".join).filter(lambda text: NAMESPACE not in text)
_KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
_SCALARS = {
    "string": _STRINGS,
    "integer": st.integers(-(10**15), 10**15),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
}


@st.composite
def _typed(draw: st.DrawFn, depth: int) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    """A schema, and the values that follow it."""
    kinds = [*_SCALARS, *(("array", "object") if depth else ())]
    kind = draw(st.sampled_from(kinds))
    if kind == "array":
        schema, values = draw(_typed(depth - 1))
        return {"type": "array", "items": schema}, st.lists(values, max_size=3)
    if kind == "object":
        return draw(_objects(depth - 1))
    return {"type": kind}, _SCALARS[kind]


@st.composite
def _objects(draw: st.DrawFn, depth: int) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    members = draw(st.dictionaries(_KEYS, _typed(depth), max_size=3))
    properties = {key: schema for key, (schema, _) in members.items()}
    values = st.fixed_dictionaries({key: values for key, (_, values) in members.items()})
    return {"type": "object", "properties": properties}, values


@st.composite
def calls(draw: st.DrawFn, *, depth: int = 3) -> Call:
    """A tool with parameters nested up to `depth` times, and a call of it."""
    schema, values = draw(_objects(depth))
    function = {"name": draw(_KEYS), "description": "Drawn at random.", "parameters": schema}
    return Call({"type": "function", "function": function}, draw(values))
