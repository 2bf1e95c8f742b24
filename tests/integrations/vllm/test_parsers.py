"""vLLM's own parsers on the shared corpus: no engine, the classes its server composes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pytest
from packaging.version import Version

from m3_vllm.compat import vllm_version
from tests.integrations.parser_corpus import TOOLS, Piece, Reply, Thinking
from tests.integrations.parsers import ParserCases, ReplyParser, StreamedReply, made_call

pytestmark = pytest.mark.skipif(
    Version(vllm_version()) < Version("0.32"),
    reason="the parser of 0.31 wants an extension module that its CPU wheel was built without",
)


class VllmReplyParser:
    """`--tool-call-parser minimax_m3 --reasoning-parser minimax_m3`, as the chat endpoint does."""

    def __init__(self, thinking: Thinking, tokenizer: Any, tools: Sequence[dict[str, Any]]) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager

        composed = ParserManager.get_parser(
            tool_parser_name="minimax_m3",
            reasoning_parser_name="minimax_m3",
            enable_auto_tools=True,
            tokenizer=tokenizer,
        )
        assert composed is not None
        options = {"thinking_mode": thinking}
        messages: Any = [{"role": "user", "content": "amber?"}]
        body = {
            "model": "m3",
            "messages": messages,
            "tools": tools,
            "chat_template_kwargs": options,
        }
        request = ChatCompletionRequest.model_validate(body)
        asked: Any = request.tools
        parser = composed(tokenizer, asked, chat_template_kwargs=options)
        self._request = parser.adjust_request(request)
        self._parser = parser
        self._prompt = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False, **options
        )

    def whole(self, text: str) -> Reply:
        self._parser.set_prompt_token_ids(self._prompt)
        reasoning, content, calls = self._parser.parse(text, self._request, enable_auto_tools=True)
        return Reply(
            reasoning=reasoning or "",
            content=content or "",
            calls=tuple(made_call(call.name, call.arguments) for call in calls or ()),
        )

    def stream(self, pieces: Iterable[Piece]) -> Reply:
        got = StreamedReply()
        # the last step has the end of the turn, which is no text
        end = Piece("", tuple(self._parser.model_tokenizer.encode("[e~[")))
        for piece in (*pieces, end):
            delta = self._parser.parse_delta(
                piece.text,
                list(piece.token_ids),
                self._request,
                self._prompt,
                finished=piece is end,
            )
            if delta is None:
                continue
            got.reasoning += delta.reasoning or ""
            got.content += delta.content or ""
            for call in delta.tool_calls or ():
                function = call.function
                if function is not None:
                    got.call(call.index, function.name, function.arguments)
        return got.reply()


class TestParsers(ParserCases):
    host: ClassVar = "vllm"
    release: ClassVar = vllm_version()

    def parser(
        self, thinking: Thinking, tokenizer: Any, tools: Sequence[dict[str, Any]] = TOOLS
    ) -> ReplyParser:
        return VllmReplyParser(thinking, tokenizer, tools)
