"""Prefill and decode on two real vLLM servers, asked as vLLM's example of a proxy asks them.

The first reads a prompt and says where its pages are; the second fetches them and answers. Prompts
are longer than the sparse layers read, among decoys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from m3_plugin.host.serving import ServerProcess, free_port, vllm_command
from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from tests.integrations.disaggregated import (
    TRANSPORT,
    chat,
    kill,
    kill_while_it_answers,
    metric,
    post,
    said,
)
from tests.integrations.server import MODEL
from tests.integrations.vllm.test_server import SERVER_ENVIRONMENT
from tests.integrations.vllm.test_transfer import NIXL, PAGE

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(not (NIXL / ".ready").exists(), reason="no .venv/nixl"),
]

OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "8192"),
    *("--max-num-batched-tokens", "1024"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
    *("--limit-mm-per-prompt", '{"image": 0, "video": 0}'),
    "--enforce-eager",
)
CONNECTOR = '{"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}'
# what vLLM's proxy asks of the first server
READ_ALONE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def start(checkpoint: Path, log: Path) -> ServerProcess:
    port = free_port()
    options = (*OPTIONS, "--kv-transfer-config", CONNECTOR)
    return ServerProcess(
        vllm_command(checkpoint, port=port, options=options),
        port=port,
        log=log,
        environment={
            **SERVER_ENVIRONMENT,
            **TRANSPORT,
            "PYTHONPATH": str(NIXL),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        },
    )


@pytest.fixture(scope="module")
def servers(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerProcess]]:
    """One that reads and one that answers, started one after the other."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        found = []
        for role in ("prefill", "decode"):
            server = stack.enter_context(start(constructed_checkpoint, folder / f"{role}.log"))
            server.wait_until_ready(timeout_s=900)
            found.append(server)
        yield found


def read(prefill: ServerProcess, prompt: NeedlePrompt) -> dict[str, Any]:
    """Let the first server read a prompt; what the second needs to fetch it."""
    reply = post(prefill, chat(prompt, max_tokens=1, kv_transfer_params=READ_ALONE))
    assert reply.status_code == 200, reply.text
    return reply.json()["kv_transfer_params"]


@pytest.mark.parametrize(("seed", "length"), [(61, 2700), (62, 3300)])
def test_a_prompt_read_there_is_answered_here(
    servers: list[ServerProcess], seed: int, length: int
) -> None:
    prefill, decode = servers
    prompt = needle_prompt(seed, num_tokens=length)
    fetched = "vllm:external_prefix_cache_hits_total"
    before = metric(decode, fetched)
    reply = post(decode, chat(prompt, kv_transfer_params=read(prefill, prompt)))
    assert said(reply) == prompt.expected_text
    assert metric(decode, fetched) - before >= length - PAGE


def test_a_first_server_that_is_killed_is_an_error(servers: list[ServerProcess]) -> None:
    """By vLLM's own default; the second goes on by itself."""
    prefill, decode = servers
    prompt, other = (needle_prompt(seed, num_tokens=2900) for seed in (63, 64))
    where = read(prefill, prompt)
    kill(prefill)
    reply = post(decode, chat(prompt, kv_transfer_params=where))
    assert reply.status_code >= 500, reply.text
    assert "error" in reply.json()
    assert said(post(decode, chat(other))) == other.expected_text


def test_a_second_server_that_is_killed_is_an_error(servers: list[ServerProcess]) -> None:
    """In the middle of its answer. The last test of these servers."""
    _, decode = servers
    prompt = needle_prompt(65, num_tokens=2900)
    with pytest.raises(httpx.TransportError):
        kill_while_it_answers(decode, chat(prompt, max_tokens=1000, ignore_eos=True))
