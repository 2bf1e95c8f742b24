"""SGLang's chats with MiniMax-M3: special tokens typed into a message stay text.

`m3_plugin.model.typed_tokens` has the reasons and the rules. The hooks stand where SGLang renders a
chat of plain dicts and encodes it, which its chat, Responses, Anthropic and tokenize endpoints
share. A prompt that holds typed tokens goes on as ids, since its text would be read anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from m3_plugin.model.typed_tokens import CUT, TypedTokens, encode_cut, without_cuts

_CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat."
RENDER = _CHAT + "_render_and_encode_chat_template"
PREFIX = _CHAT + "_append_assistant_prefix_to_prompt_ids"
PROMPT = _CHAT + "_engine_prompt"


def register_chats() -> None:
    """The hooks, for models that are ours."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in ((RENDER, render), (PREFIX, append_prefix), (PROMPT, engine_prompt)):
        HookRegistry.register(target, hook, HookType.AROUND)


def typed_tokens(chat: Any) -> TypedTokens | None:
    """Of the server's tokenizer; None for models that are not ours."""
    from m3_sglang.registration import is_ours

    if not is_ours(chat.tokenizer_manager.model_config.hf_config):
        return None
    return _of(chat.tokenizer_manager.tokenizer)


@cache
def _of(tokenizer: Any) -> TypedTokens:
    return TypedTokens.of(tokenizer)


def render(
    original: Any,
    chat: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None,
    template_kwargs: dict[str, Any],
    encode_kwargs: dict[str, Any],
    **kwargs: Any,
) -> tuple[list[int], str | None]:
    """AROUND hook: ids of the rendered chat, and their text."""
    typed = typed_tokens(chat)
    if typed is None:
        cut = {"tools": tools, "template_kwargs": template_kwargs}
    else:
        messages = typed.messages(messages)
        cut = {
            "tools": typed.values(tools),
            "template_kwargs": {name: typed.values(v) for name, v in template_kwargs.items()},
        }
    ids, text = original(chat, messages, **cut, encode_kwargs=encode_kwargs, **kwargs)
    if typed is None or not _holds_cuts([messages, cut]):
        return ids, text
    tokenizer = chat.tokenizer_manager.tokenizer
    rendered = tokenizer.decode(ids, skip_special_tokens=False) if text is None else text
    pieces = encode_cut(rendered, lambda piece: tokenizer.encode(piece, **encode_kwargs))
    return pieces, None if text is None else without_cuts(text)


def append_prefix(original: Any, chat: Any, prompt_ids: list[int], prefix: str) -> list[int]:
    """AROUND hook: the assistant's words that an answer continues, behind the prompt."""
    typed = typed_tokens(chat)
    if typed is None or CUT not in (cut := typed.text(prefix, of_assistant=True)):
        return original(chat, prompt_ids, prefix)
    for piece in cut.split(CUT):
        prompt_ids = original(chat, prompt_ids, piece) if piece else prompt_ids
    return prompt_ids


def engine_prompt(
    original: Any, chat: Any, processed: Any, is_multimodal: bool
) -> tuple[str, str | list[int]]:
    """AROUND hook: what the engine gets of a rendered chat."""
    kind, prompt = original(chat, processed, is_multimodal)
    typed = typed_tokens(chat)
    ids = processed.prompt_ids
    if typed is None or kind != "text" or not isinstance(ids, list):
        return kind, prompt
    return ("input_ids", ids) if typed.hidden_in(prompt, ids) else (kind, prompt)


def _holds_cuts(value: Any) -> bool:
    return without_cuts(value) != value
