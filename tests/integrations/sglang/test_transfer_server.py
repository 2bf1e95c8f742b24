"""Prefill and decode on two real SGLang servers over HTTP, asked as SGLang's router asks them.

Both get the same request at the same time, with the same room in it. Prompts are longer than the
sparse layers read, among decoys; the second server computes no prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from m3_plugin.host.serving import ServerProcess, free_port, sglang_command
from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_sglang.compat import fleets_are_tested
from tests.integrations.disaggregated import (
    TRANSPORT,
    chat,
    kill,
    kill_while_it_answers,
    post,
    said,
)
from tests.integrations.server import MODEL
from tests.integrations.sglang.engine import ENVIRONMENT
from tests.integrations.sglang.test_transfer import NIXL

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(not (NIXL / ".ready").exists(), reason="no .venv/nixl"),
    pytest.mark.skipif(not fleets_are_tested(), reason="refused on this SGLang"),
]

OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--device", "cpu"),
    *("--context-length", "8192"),
    *("--max-total-tokens", "16384"),
    *("--max-running-requests", "4"),
    *("--mem-fraction-static", "0.1"),
    *("--chunked-prefill-size", "1024"),
    *("--disaggregation-transfer-backend", "nixl"),
    "--sleep-on-idle",
)


@dataclass
class Pair:
    """Two servers, and the port at which the first tells where its caches are."""

    checkpoint: Path
    folder: Path
    stack: ExitStack
    bootstrap: int = field(default_factory=free_port)
    rooms: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def start(self, role: str) -> ServerProcess:
        port = free_port()
        own = ("--disaggregation-bootstrap-port", str(self.bootstrap)) if role == "prefill" else ()
        options = (*OPTIONS, "--disaggregation-mode", role, *own)
        server = self.stack.enter_context(
            ServerProcess(
                sglang_command(self.checkpoint, port=port, options=options),
                port=port,
                log=self.folder / f"{role}-{port}.log",
                environment={
                    **ENVIRONMENT,
                    **TRANSPORT,
                    "PYTHONPATH": str(NIXL),
                    # a peer that died is noticed after two beats
                    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
                },
            )
        )
        server.wait_until_ready(timeout_s=900)
        return server

    def body(self, prompt: NeedlePrompt, **more: Any) -> dict[str, Any]:
        """A request for both servers, in a room of its own."""
        return chat(
            prompt,
            bootstrap_host="127.0.0.1",
            bootstrap_port=self.bootstrap,
            bootstrap_room=next(self.rooms),
            **more,
        )


@pytest.fixture(scope="module")
def pair(constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(constructed_checkpoint, tmp_path_factory.mktemp("servers"), stack)


def test_two_servers_answer_until_one_is_killed(pair: Pair) -> None:
    """An answer or an error: with both, without the first, with a new one, without the second."""
    prefill, decode = pair.start("prefill"), pair.start("decode")
    prompts = [needle_prompt(seed, num_tokens=n) for seed, n in ((61, 2700), (62, 3300))]
    with ThreadPoolExecutor(8) as pool:
        for prompt in prompts:
            body = pair.body(prompt)
            read = pool.submit(post, prefill, body)
            assert said(post(decode, body)) == prompt.expected_text
            read.result()

        body = pair.body(needle_prompt(63, num_tokens=2900))
        waiting = pool.submit(post, decode, body)
        kill(prefill)
        reply = waiting.result(120)
        assert reply.status_code >= 500, reply.text
        assert "prefill" in reply.text

        prefill = pair.start("prefill")
        prompt = needle_prompt(64, num_tokens=3000)
        body = pair.body(prompt)
        read = pool.submit(post, prefill, body)
        assert said(post(decode, body)) == prompt.expected_text
        read.result()

        body = pair.body(needle_prompt(65, num_tokens=2900), max_tokens=1000, ignore_eos=True)
        read = pool.submit(post, prefill, body)
        with pytest.raises(httpx.TransportError):
            kill_while_it_answers(decode, body)
        read.result(300)
