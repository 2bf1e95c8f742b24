"""vLLM's renderer of chats, for MiniMax-M3: special tokens typed into a message stay text.

It also loads the pictures of a chat, so that what a decoder raises on them is answered here.

`m3_plugin.model.typed_tokens` has the reasons and the rules. vLLM renders with the chat template
first and tokenizes later; both steps are overridden here, for models that are ours. Prompts of the
completions endpoint and ids pass: they are the operator's own words, markers included.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY

from m3_plugin.model.media import reading_media
from m3_plugin.model.typed_tokens import CUT, TypedTokens, without_cuts
from m3_vllm.registry import why_left_alone

_ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
_MODE = "hf"
_VLLMS_OWN = ("vllm.renderers.hf", "HfRenderer")


class M3Renderer(HfRenderer):
    """`HfRenderer`, with the added tokens in what a chat says cut."""

    @cached_property
    def _typed(self) -> TypedTokens | None:
        """None for models that are not ours."""
        hf_config = self.model_config.hf_config
        names = getattr(hf_config, "architectures", None) or []
        if not any(name in _ARCHITECTURES for name in names) or why_left_alone(hf_config):
            return None
        return TypedTokens.of(self.get_tokenizer())

    def _cut(self, messages: Any, params: Any) -> tuple[Any, Any]:
        if self._typed is None:
            return messages, params
        kwargs = {n: self._typed.values(v) for n, v in params.chat_template_kwargs.items()}
        # a text, so that it can be tokenized in pieces
        kwargs["tokenize"] = False
        return self._typed.messages(messages), replace(params, chat_template_kwargs=kwargs)

    def _reading(self) -> AbstractContextManager[None]:
        # vLLM's loader has no class of its own for a URL it may not open
        return nullcontext() if self._typed is None else reading_media(RuntimeError)

    def render_messages(self, messages: Any, params: Any) -> tuple[Any, Any]:
        with self._reading():
            conversation, prompt = super().render_messages(*self._cut(messages, params))
        return without_cuts(conversation), prompt

    async def render_messages_async(self, messages: Any, params: Any) -> tuple[Any, Any]:
        with self._reading():
            conversation, prompt = await super().render_messages_async(*self._cut(messages, params))
        return without_cuts(conversation), prompt

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """vLLM's, of each piece between two cuts."""
        pieces = [piece for piece in prompt["prompt"].split(CUT) if piece]
        if len(pieces) < 2 or self._typed is None:
            return super()._tokenize_prompt(prompt, params)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for piece in pieces:
            of_piece: Any = {**prompt, "prompt": piece}
            tokens = super()._tokenize_prompt(of_piece, params)
            ids += tokens["prompt_token_ids"]
            offsets += [(begin + a, begin + b) for a, b in tokens.get("prompt_token_offsets") or ()]
            begin += len(piece)
            params = replace(params, add_special_tokens=False)
        whole: Any = {**prompt, "prompt": "".join(pieces)}
        return self._build_tokens_prompt(ids, whole, offset_mapping=offsets or None)


def register_renderer() -> None:
    """Our renderer in the place of vLLM's own.

    Raises
    ------
    RuntimeError : this vLLM has no such renderer, so that typed tokens would count.
    """
    renderers = RENDERER_REGISTRY.renderers
    held = renderers.get(_MODE)
    if held == _VLLMS_OWN:
        renderers[_MODE] = (__name__, M3Renderer.__name__)
    elif held != (__name__, M3Renderer.__name__):
        raise RuntimeError(
            f"vLLM renders chats with {held}, where m3-plugin expected {_VLLMS_OWN}: special "
            "tokens that users type would count as markers; remove the other renderer"
        )
