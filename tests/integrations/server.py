"""What every host's server must do over HTTP, on the constructed checkpoint: one list of cases.

A host's `test_server.py` starts its server in the module fixture `server`, derives `ServerCases`
and says the few things in which the hosts' words differ.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from m3_plugin.host.serving import ServerProcess
from m3_plugin.testing.prompts import colour_rgb, needle_prompt, picture_prompt

MODEL = "m3"
NO_THINKING = {"chat_template_kwargs": {"thinking_mode": "disabled"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]


def ask(client: OpenAI, messages: list[Any], max_tokens: int, **options: Any) -> Any:
    """A greedy chat completion, or its stream."""
    return client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        extra_body=NO_THINKING,
        **options,
    )


def picture_messages(colour: str) -> tuple[list[Any], str, int]:
    """Messages with one picture in them, the answer, and its number of tokens."""
    prompt = picture_prompt((colour,))
    data = io.BytesIO()
    Image.new("RGB", (112, 112), colour_rgb(colour)).save(data, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}} if part["type"] == "image" else part
        for part in prompt.content
    ]
    return [{"role": "user", "content": parts}], prompt.expected_text, prompt.max_tokens


def user_says(*parts: Any) -> dict[str, Any]:
    """A request whose only message has these parts."""
    return {"model": MODEL, "messages": [{"role": "user", "content": list(parts)}]}


def bad_requests() -> dict[str, Any]:
    """Bodies that no server may accept, or die of, by name."""
    word = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    return {
        "no json": b"{not json",
        "no messages": {"model": MODEL},
        "unknown role": {"model": MODEL, "messages": [{"role": "nobody", "content": 3}]},
        "too long": user_says({"type": "text", "text": " the" * 9000}),
        "bad temperature": {**word, "temperature": -1},
        "broken image": user_says(
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        ),
        "too many images": {"model": MODEL, "messages": picture_messages("red")[0] * 3},
    }


def counter(server: ServerProcess, name: str, *, label: str) -> float:
    """Sum of one of the plugin's own counters in the server's metrics."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    mine = [line for line in lines if line.startswith(f"m3_plugin:{name}_total")]
    return sum(float(line.rpartition(" ")[2]) for line in mine if label in line)


class ServerCases:
    """Derive, and fill in what differs between the hosts.

    Attributes
    ----------
    metrics : names that the host's /metrics must hold after a request
    audio_part : message part by which this host's clients send audio
    """

    metrics: tuple[str, ...]
    audio_part: ClassVar[Mapping[str, Any]]

    @pytest.fixture
    def client(self, server: ServerProcess) -> OpenAI:
        return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)

    def error_message(self, body: dict[str, Any]) -> str:
        """The reason in the body of a refused request."""
        raise NotImplementedError

    def test_chat_completion(self, client: OpenAI) -> None:
        prompt = needle_prompt(701, num_tokens=3000)
        reply = ask(client, prompt.messages(), prompt.max_tokens)
        assert reply.choices[0].message.content == prompt.expected_text
        assert reply.choices[0].finish_reason == "stop"

    def test_streaming_gives_the_same_and_reports_cached_tokens(self, client: OpenAI) -> None:
        prompt = needle_prompt(702, num_tokens=2500)
        whole = ask(client, prompt.messages(), prompt.max_tokens)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(ask(client, prompt.messages(), prompt.max_tokens, **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content == prompt.expected_text
        usage = chunks[-1].usage
        assert usage.prompt_tokens_details.cached_tokens >= 2432
        assert usage.prompt_tokens == whole.usage.prompt_tokens

    def test_a_prompted_thought_is_no_answer(self, client: OpenAI) -> None:
        """The prompt opens the thought, the model ends it at once and answers."""
        prompt = needle_prompt(708, num_tokens=3000)
        options = {
            "model": MODEL,
            "messages": prompt.messages(),
            "max_tokens": prompt.max_tokens + 1,
            "temperature": 0,
            "extra_body": {"chat_template_kwargs": {"thinking_mode": "enabled"}},
        }
        whole = client.chat.completions.create(**options)
        assert whole.choices[0].message.content == prompt.expected_text
        chunks = client.chat.completions.create(**options, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == prompt.expected_text
        # the end of the thought is one token more than the answer has
        assert whole.usage.completion_tokens == prompt.max_tokens + 1

    def test_base64_image(self, client: OpenAI) -> None:
        messages, expected, max_tokens = picture_messages("magenta")
        assert ask(client, messages, max_tokens).choices[0].message.content == expected

    def test_tools_and_reasoning_parsers_accept_a_request(self, client: OpenAI) -> None:
        prompt = needle_prompt(703, num_tokens=2000)
        reply = ask(client, prompt.messages(), prompt.max_tokens, tools=TOOLS)
        assert reply.choices[0].message.content == prompt.expected_text
        assert not reply.choices[0].message.tool_calls

    def test_metrics(self, server: ServerProcess, client: OpenAI) -> None:
        prompt = needle_prompt(704, num_tokens=1400)
        ask(client, prompt.messages(), prompt.max_tokens)
        text = httpx.get(f"{server.url}/metrics").text
        assert [name for name in self.metrics if name not in text] == []

    @pytest.mark.parametrize("name", bad_requests())
    def test_bad_requests_get_a_4xx_with_a_reason(self, server: ServerProcess, name: str) -> None:
        self.refused(server, bad_requests()[name])

    def test_audio_is_refused_by_name_and_counted(self, server: ServerProcess) -> None:
        before = counter(server, "requests_refused", label='part="audio"')
        assert "no audio tower" in self.refused(server, user_says(self.audio_part))
        assert counter(server, "requests_refused", label='part="audio"') == before + 1

    def refused(self, server: ServerProcess, body: Any) -> str:
        """Post a request that must be refused as the client's mistake; the reason given."""
        reply = httpx.post(
            f"{server.url}/v1/chat/completions",
            headers={"content-type": "application/json"},
            content=body if isinstance(body, bytes) else json.dumps(body).encode(),
            timeout=60,
        )
        assert 400 <= reply.status_code < 500, reply.text
        reason = self.error_message(reply.json())
        assert reason
        return reason

    def test_the_server_lives_on_after_bad_requests(
        self, client: OpenAI, server: ServerProcess
    ) -> None:
        assert httpx.get(f"{server.url}/health").status_code == 200
        prompt = needle_prompt(705, num_tokens=1400)
        reply = ask(client, prompt.messages(), prompt.max_tokens)
        assert reply.choices[0].message.content == prompt.expected_text

    def test_a_client_that_goes_away_harms_nobody(self, client: OpenAI) -> None:
        prompt = needle_prompt(706, num_tokens=6000)
        stream = ask(client, prompt.messages(), 200, stream=True)
        next(iter(stream))
        stream.close()
        reply = ask(client, prompt.messages(), prompt.max_tokens)
        assert reply.choices[0].message.content == prompt.expected_text
