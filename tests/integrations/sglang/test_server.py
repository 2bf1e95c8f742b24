"""A real server process over HTTP: chat, streaming, pictures, parsers, metrics, bad requests."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from m3_plugin.serving import ServerProcess, free_port, sglang_command
from m3_plugin.testing.prompts import colour_rgb, needle_prompt, picture_prompt
from tests.integrations.sglang.engine import ENVIRONMENT

MODEL = "m3"
OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--device", "cpu"),
    *("--context-length", "8192"),
    *("--max-total-tokens", "16384"),
    *("--max-running-requests", "4"),
    *("--mem-fraction-static", "0.1"),
    *("--chunked-prefill-size", "2048"),
    *("--tool-call-parser", "minimax-m3"),
    *("--reasoning-parser", "minimax-m3"),
    *("--limit-mm-data-per-request", '{"image": 2, "video": 1}'),
    "--enable-metrics",
    "--enable-cache-report",
    "--sleep-on-idle",
)
SERVER_ENVIRONMENT = {**ENVIRONMENT, "M3_PLUGIN_STATISTICS": "1"}
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


@pytest.fixture(scope="module")
def server(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    port = free_port()
    command = sglang_command(constructed_checkpoint, port=port, options=OPTIONS)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(command, port=port, log=log, environment=SERVER_ENVIRONMENT) as server:
        server.wait_until_ready(timeout_s=300)
        yield server


@pytest.fixture
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: OpenAI, messages: list[Any], max_tokens: int, **options: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        extra_body=NO_THINKING,
        **options,
    )


def picture_parts(colour: str) -> tuple[list[Any], str, int]:
    from PIL import Image

    prompt = picture_prompt((colour,))
    data = io.BytesIO()
    Image.new("RGB", (112, 112), colour_rgb(colour)).save(data, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}} if part["type"] == "image" else part
        for part in prompt.content
    ]
    return [{"role": "user", "content": parts}], prompt.expected_text, prompt.max_tokens


def test_every_process_says_that_the_plugin_is_there(server: ServerProcess) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "m3-plugin 0." in line]
    # launcher, scheduler and detokenizer
    assert sum("registered MiniMaxM3Sparse" in line for line in lines) == 3, lines
    serving = [line for line in lines if "serving MiniMax-M3 with 2 MSA" in line]
    assert len(serving) == 1, lines
    assert "kernels: " in serving[0]


def test_chat_completion(client: OpenAI) -> None:
    prompt = needle_prompt(701, num_tokens=3000)
    reply = ask(client, prompt.messages(), prompt.max_tokens)
    assert reply.choices[0].message.content == prompt.expected_text
    assert reply.choices[0].finish_reason == "stop"


def test_streaming_gives_the_same_and_reports_cached_tokens(client: OpenAI) -> None:
    prompt = needle_prompt(702, num_tokens=2500)
    whole = ask(client, prompt.messages(), prompt.max_tokens)
    chunks = list(
        ask(
            client,
            prompt.messages(),
            prompt.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content == prompt.expected_text
    usage = chunks[-1].usage
    assert usage.prompt_tokens_details.cached_tokens >= 2432
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_base64_image(client: OpenAI) -> None:
    messages, expected, max_tokens = picture_parts("magenta")
    assert ask(client, messages, max_tokens).choices[0].message.content == expected


def test_tools_and_reasoning_parsers_accept_a_request(client: OpenAI) -> None:
    prompt = needle_prompt(703, num_tokens=2000)
    reply = ask(client, prompt.messages(), prompt.max_tokens, tools=TOOLS)
    assert reply.choices[0].message.content == prompt.expected_text
    assert not reply.choices[0].message.tool_calls


def test_metrics(server: ServerProcess, client: OpenAI) -> None:
    prompt = needle_prompt(704, num_tokens=1400)
    ask(client, prompt.messages(), prompt.max_tokens)
    text = httpx.get(f"{server.url}/metrics").text
    assert "sglang:prompt_tokens_total" in text
    assert "sglang:cache_hit_rate" in text


def counter(server: ServerProcess, name: str) -> float:
    """Sum of one of the decode counters of our own in the server's metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith(f"m3_plugin:msa_{name}_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'phase="decode"' in line)


def test_blocks_read_stay_within_the_budget(server: ServerProcess, client: OpenAI) -> None:
    """Top-4 of 128-token blocks: a decode row reads 4 blocks per layer and group, never more."""
    names = ("rows", "blocks_read", "blocks_visible")
    before = {name: counter(server, name) for name in names}
    prompt = needle_prompt(707, num_tokens=6000)
    reply = ask(client, prompt.messages(), prompt.max_tokens)
    assert reply.choices[0].message.content == prompt.expected_text
    rows, read, visible = (counter(server, name) - before[name] for name in names)
    layers, groups, topk = 2, 4, 4
    # SGLang starts one more step before it learns that a request has ended
    steps = rows / layers
    assert prompt.max_tokens - 1 <= steps <= prompt.max_tokens
    assert read == rows * groups * topk
    assert visible >= rows * groups * (6000 // 128 + 1)


BAD_REQUESTS = {
    "no json": b"{not json",
    "no messages": {"model": MODEL},
    "unknown role": {"model": MODEL, "messages": [{"role": "nobody", "content": 3}]},
    "too long": {"model": MODEL, "messages": [{"role": "user", "content": " the" * 9000}]},
    "bad temperature": {
        "model": MODEL,
        "temperature": -1,
        "messages": [{"role": "user", "content": "x"}],
    },
    "broken image": {
        "model": MODEL,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                ],
            }
        ],
    },
    "too many images": {
        "model": MODEL,
        "messages": picture_parts("red")[0] * 3,
    },
    "audio": {
        "model": MODEL,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}
                ],
            }
        ],
    },
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_get_a_4xx_with_a_reason(server: ServerProcess, name: str) -> None:
    body = BAD_REQUESTS[name]
    reply = httpx.post(
        f"{server.url}/v1/chat/completions",
        headers={"content-type": "application/json"},
        content=body if isinstance(body, bytes) else json.dumps(body).encode(),
        timeout=60,
    )
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["message"]
    if name == "audio":
        assert "no audio tower" in reply.text


def test_the_server_lives_on_after_bad_requests(client: OpenAI, server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    prompt = needle_prompt(705, num_tokens=1400)
    reply = ask(client, prompt.messages(), prompt.max_tokens)
    assert reply.choices[0].message.content == prompt.expected_text


def test_a_client_that_goes_away_harms_nobody(client: OpenAI) -> None:
    prompt = needle_prompt(706, num_tokens=6000)
    stream = ask(client, prompt.messages(), 200, stream=True)
    next(iter(stream))
    stream.close()
    reply = ask(client, prompt.messages(), prompt.max_tokens)
    assert reply.choices[0].message.content == prompt.expected_text
