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
from packaging.version import Version

from m3_plugin.serving import ServerProcess, free_port, vllm_command
from m3_plugin.testing.prompts import colour_rgb, needle_prompt, picture_prompt
from m3_vllm.compat import vllm_version
from tests.integrations.vllm.engine import ENVIRONMENT

MODEL = "m3"
OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "8192"),
    *("--max-num-batched-tokens", "2048"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
    *("--limit-mm-per-prompt", '{"image": 2, "video": 1}'),
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    *("--reasoning-parser", "minimax_m3"),
)
TOOL_OPTIONS = ("--tool-call-parser", "minimax_m3", "--enable-auto-tool-choice")
# The parser of 0.31 wants an extension module that its CPU wheel was built without.
HAS_TOOL_PARSER = Version(vllm_version()) >= Version("0.32")
SERVER_ENVIRONMENT = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
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
    options = OPTIONS + (TOOL_OPTIONS if HAS_TOOL_PARSER else ())
    command = vllm_command(constructed_checkpoint, port=port, options=options)
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
    registered = [line for line in lines if "registered" in line]
    # the API server speaks before vLLM labels its lines
    assert any("EngineCore" not in line and "Worker" not in line for line in registered), lines
    assert any("EngineCore" in line for line in registered), lines
    assert any("Worker" in line for line in registered), lines
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


@pytest.mark.skipif(not HAS_TOOL_PARSER, reason="this vLLM was built without tool parsers")
def test_tools_and_reasoning_parsers_accept_a_request(client: OpenAI) -> None:
    prompt = needle_prompt(703, num_tokens=2000)
    reply = ask(client, prompt.messages(), prompt.max_tokens, tools=TOOLS)
    assert reply.choices[0].message.content == prompt.expected_text
    assert not reply.choices[0].message.tool_calls


def test_metrics(server: ServerProcess, client: OpenAI) -> None:
    prompt = needle_prompt(704, num_tokens=1400)
    ask(client, prompt.messages(), prompt.max_tokens)
    text = httpx.get(f"{server.url}/metrics").text
    assert "vllm:prompt_tokens_total" in text
    assert "vllm:prefix_cache_hits_total" in text


BAD_REQUESTS = {
    "no json": b"{not json",
    "no messages": {"model": MODEL},
    "unknown role": {"model": MODEL, "messages": [{"role": "nobody", "content": 3}]},
    "unknown model": {"model": "other", "messages": [{"role": "user", "content": "x"}]},
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
                    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
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
    assert reply.json()["error"]["message"]
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
