"""SGLang's chats with MiniMax-M3: special tokens typed into a message stay text.

`m3_plugin.model.typed_tokens` has the reasons and the rules. The hooks stand where SGLang renders a
chat of plain dicts and encodes it, which its chat, Responses, Anthropic and tokenize endpoints
share. A prompt that holds typed tokens goes on as ids, since its text would be read anew.

The Ollama chat renders by itself, through the tokenizer, and gets one that cuts. The decision
endpoints render in several places, and are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable
from functools import cache
from typing import Any

from m3_plugin.model.typed_tokens import CUT, TypedTokens, encode_cut, without_cuts
from m3_sglang.ours import is_ours

_CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat."
RENDER = _CHAT + "_render_and_encode_chat_template"
PREFIX = _CHAT + "_append_assistant_prefix_to_prompt_ids"
PROMPT = _CHAT + "_engine_prompt"
OLLAMA = "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat"
DECISIONS = (
    "sglang.srt.entrypoints.openai.serving_decisions.OpenAIServingDecisions._validate_request",
    "sglang.srt.entrypoints.systemone.serving.SystemOneServing._validate_request",
)


def register_chats() -> None:
    """The hooks, for models that are ours."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = {RENDER: render, PREFIX: append_prefix, PROMPT: engine_prompt, OLLAMA: ollama_chat}
    for target, hook in {**hooks, **dict.fromkeys(DECISIONS, refuse_decisions)}.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def typed_tokens(chat: Any) -> TypedTokens | None:
    """Of the server's tokenizer; None for models that are not ours."""
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


def ollama_chat(original: Any, serving: Any, *args: Any) -> Awaitable[Any]:
    """AROUND hook: Ollama's chat, with a tokenizer that cuts what the messages say."""
    typed = typed_tokens(serving)
    if typed is None:
        return original(serving, *args)
    cutting = copy.copy(serving)
    cutting.tokenizer_manager = _CuttingManager(serving.tokenizer_manager, typed)
    return original(cutting, *args)


class _CuttingManager:
    """A tokenizer manager whose tokenizer renders chats with cuts; the rest is its own."""

    def __init__(self, manager: Any, typed: TypedTokens) -> None:
        self._manager = manager
        self.tokenizer = _CuttingTokenizer(manager.tokenizer, typed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


class _CuttingTokenizer:
    def __init__(self, tokenizer: Any, typed: TypedTokens) -> None:
        self._tokenizer = tokenizer
        self._typed = typed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, return_dict: bool, **kwargs: Any
    ) -> list[int]:
        """Ids of the rendered messages, which is all that Ollama's chat asks for."""
        cut = self._typed.messages(messages)
        text = self._tokenizer.apply_chat_template(cut, tokenize=False, **kwargs)
        return encode_cut(
            text, lambda piece: self._tokenizer.encode(piece, add_special_tokens=False)
        )


def refuse_decisions(original: Any, serving: Any, request: Any) -> str | None:
    """AROUND hook: why a request for a decision is answered with 400."""
    if typed_tokens(serving) is None:
        return original(serving, request)
    return (
        "m3-plugin does not serve decisions with MiniMax-M3: special tokens typed into them would "
        "count as markers; ask by /v1/chat/completions"
    )


def _holds_cuts(value: Any) -> bool:
    return without_cuts(value) != value
