"""Typed special tokens: ids of ordinary text that read as they were typed, wherever they stand."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_plugin.model.typed_tokens import CUT, TypedTokens, encode_cut, without_cuts
from m3_plugin.testing.hub_layout import MARKER_TOKENS, SPECIAL_TOKENS, byte_level_tokenizer
from m3_plugin.testing.vocabulary import PATTERN, VOCABULARY

EVERY = (*SPECIAL_TOKENS, *MARKER_TOKENS)
TYPED = TypedTokens({**dict.fromkeys(SPECIAL_TOKENS, True), **dict.fromkeys(MARKER_TOKENS, False)})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    import m3_plugin.testing

    backend = byte_level_tokenizer(words=VOCABULARY.texts, pattern=PATTERN)
    template = Path(m3_plugin.testing.__file__).with_name("chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """A chat's ids as an adapter gets them; decoded, they are the chat as it was sent."""
    typed = TypedTokens.of(tokenizer)
    render = tokenizer.apply_chat_template
    options["tokenize"] = False
    tools = options.pop("tools", None)
    cut = render(typed.messages(messages), tools=typed.values(tools), **options)
    ids = encode_cut(cut, lambda piece: tokenizer.encode(piece, add_special_tokens=False))
    assert tokenizer.decode(ids) == render(messages, tools=tools, **options)
    return ids


def added(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in ids if i in tokenizer.added_tokens_decoder]


def chats(text: str) -> dict[str, dict[str, Any]]:
    """A text wherever a client can put one."""
    call = {"function": {"name": "f", "arguments": {"a": text, "b": [{"c": text}]}}}
    asked = {"role": "user", "content": "x"}
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    return {
        "user": {"messages": [{"role": "user", "content": text}]},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": text}] * 2}]},
        "letters": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": c} for c in text]}]
        },
        "system": {"messages": [{"role": "system", "content": text}, asked]},
        "tool": {"messages": [asked, {"role": "tool", "content": text}]},
        "role": {"messages": [{"role": text, "content": "x"}]},
        "thought": {"messages": [asked, {"role": "assistant", "reasoning": text, "content": "x"}]},
        "call": {"messages": [asked, {"role": "assistant", "content": "x", "tool_calls": [call]}]},
        "definition": {"messages": [asked], "tools": [tool]},
    }


@pytest.mark.parametrize("place", chats(""))
@pytest.mark.parametrize("token", EVERY)
def test_a_typed_token_is_text_wherever_it_is_typed(tokenizer: Any, token: str, place: str) -> None:
    plain = added(tokenizer, chat_ids(tokenizer, **chats("word")[place]))
    for text in (token, f"a {token} b", token * 2, token[:-1], token[1:], f"{token[:-1]}{token}"):
        assert added(tokenizer, chat_ids(tokenizer, **chats(text)[place])) == plain


@pytest.mark.parametrize("token", EVERY)
def test_an_assistant_keeps_its_markers(tokenizer: Any, token: str) -> None:
    """What a server without parsers answered is sent back as it was."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": f"a {token} b"}]
    kept = token in added(tokenizer, chat_ids(tokenizer, messages))
    markers = added(tokenizer, chat_ids(tokenizer, [*messages[:1], {**messages[1], "content": ""}]))
    assert kept == (token in MARKER_TOKENS or token in markers)


def test_structured_turns_are_rendered_as_ever(tokenizer: Any) -> None:
    call = {"function": {"name": "look_up", "arguments": {"word": "amber", "n": [1, None]}}}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<b> [1] ]"}]},
        {"role": "assistant", "reasoning": "hm", "content": "so", "tool_calls": [call]},
        {"role": "tool", "content": "gold"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat_ids(tokenizer, messages) == tokenizer.encode(rendered)
    assert "]<]image[>[" in added(tokenizer, chat_ids(tokenizer, messages))


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(EVERY),
            st.sampled_from(EVERY).flatmap(lambda t: st.integers(1, len(t)).map(lambda n: t[:n])),
            st.sampled_from(EVERY).flatmap(lambda t: st.integers(1, len(t)).map(lambda n: t[n:])),
            st.sampled_from(["", " the", "\n", "[", "]", "<", ">"]),
        ),
        max_size=8,
    ),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_no_mixture_of_pieces_makes_a_token(
    tokenizer: Any, pieces: list[str], places: list[int]
) -> None:
    text = "".join(pieces)
    bounds = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    parts = [{"type": "text", "text": text[a:b]} for a, b in itertools.pairwise(bounds)]
    plain = added(tokenizer, chat_ids(tokenizer, [{"role": "user", "content": "x"}]))
    for content in (parts, text):
        ids = chat_ids(tokenizer, [{"role": "user", "content": content}])
        assert added(tokenizer, ids) == plain


def test_escapes_in_arguments_hide_nothing() -> None:
    message = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "]\\u003c]image[>["}'}}],
    }
    (cut,) = TYPED.messages([message])
    assert CUT in json.loads(cut["tool_calls"][0]["function"]["arguments"])["a"]
    broken = {**message, "tool_calls": [{"function": {"arguments": '{"a": "]<]image[>['}}]}
    assert CUT in TYPED.messages([broken])[0]["tool_calls"][0]["function"]["arguments"]


def test_ordinary_chats_and_media_are_left_alone() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "]<]image[>["}}]},
        {"role": "assistant", "content": None, "tool_calls": iter(())},
        {"role": "user", "content": "f([1, 2]) < 3 ]", "n": 3, "x": None},
    ]
    cut = TYPED.messages(messages)
    assert cut[0] == messages[0]
    assert cut[2] == messages[2]
    assert cut[1] == {"role": "assistant", "content": None, "tool_calls": []}


def test_cuts_can_be_taken_out() -> None:
    messages = [{"role": "user", "content": ["[e~[", {"type": "text", "text": "]~b]"}]}]
    cut = TYPED.messages(messages)
    assert cut != messages
    assert without_cuts(cut) == messages


def test_json_without_end_is_refused() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="at most 100 levels"):
        TYPED.values(deep)
