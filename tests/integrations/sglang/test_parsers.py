"""SGLang's own parsers on the shared corpus: no engine, the classes its server uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import sglang
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from tests.integrations.parser_corpus import TOOLS, Piece, Reply, Thinking
from tests.integrations.parsers import ParserCases, ReplyParser, StreamedReply, made_call


class SglangReplyParser:
    """`--tool-call-parser minimax-m3 --reasoning-parser minimax-m3`, as the chat endpoint does.

    The endpoint's own methods want a whole server around them; what they do with the two parsers is
    done here in the same order, the flush at the end included.
    """

    def __init__(self, thinking: Thinking, tokenizer: Any, tools: Sequence[dict[str, Any]]) -> None:
        request = ChatCompletionRequest.model_validate(
            {
                "model": "m3",
                "messages": [{"role": "user", "content": "amber?"}],
                "tools": tools,
                "chat_template_kwargs": {"thinking_mode": thinking},
            }
        )
        self._reasoning = ReasoningParser(
            "minimax-m3", request=request, tokenizer=tokenizer, tool_call_parser_active=True
        )
        self._tools = FunctionCallParser(
            [Tool.model_validate(tool) for tool in tools], "minimax-m3", tokenizer=tokenizer
        )

    def whole(self, text: str) -> Reply:
        reasoning, content = self._reasoning.parse_non_stream(text)
        calls = []
        if self._tools.has_tool_call(content or ""):
            content, calls = self._tools.parse_non_stream(content or "")
        return Reply(
            reasoning=reasoning or "",
            content=content or "",
            calls=tuple(made_call(call.name or "", call.parameters) for call in calls),
        )

    def stream(self, pieces: Iterable[Piece]) -> Reply:
        got = StreamedReply()
        for piece in pieces:
            self._add(got, *self._reasoning.parse_stream_chunk(piece.text), last=False)
        self._add(got, *self._reasoning.parse_stream_end(), last=True)
        return got.reply()

    def _add(
        self, got: StreamedReply, reasoning: str | None, text: str | None, *, last: bool
    ) -> None:
        got.reasoning += reasoning or ""
        content, calls = self._tools.parse_stream_chunk(text or "")
        if last:
            end, end_calls = self._tools.parse_stream_end()
            content, calls = content + end, [*calls, *end_calls]
        got.content += content
        for call in calls:
            got.call(call.tool_index, call.name, call.parameters)


class TestParsers(ParserCases):
    host: ClassVar = "sglang"
    release: ClassVar = sglang.__version__

    def parser(
        self, thinking: Thinking, tokenizer: Any, tools: Sequence[dict[str, Any]] = TOOLS
    ) -> ReplyParser:
        return SglangReplyParser(thinking, tokenizer, tools)

    def keeps(self, value: Any, *, streamed: bool) -> bool:
        if isinstance(value, str) and value != value.rstrip():
            return False
        return not streamed or value not in ("", [])
