"""A real SGLang server over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sglang
from openai import OpenAI

from m3_plugin.host.serving import ServerProcess, free_port, sglang_command
from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.insight import InsightCases, insight_environment
from tests.integrations.media_cases import MediaCases
from tests.integrations.parsers import SpokenCases
from tests.integrations.server import MODEL, ServerCases, ask, counter
from tests.integrations.sglang.engine import ENVIRONMENT
from tests.integrations.soak import SoakCases

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


@pytest.fixture(scope="module")
def server(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    port = free_port()
    command = sglang_command(constructed_checkpoint, port=port, options=OPTIONS)
    folder = tmp_path_factory.mktemp("server")
    environment = SERVER_ENVIRONMENT | insight_environment(folder) | {"M3_PLUGIN_CHECK": "1"}
    log = folder / "server.log"
    with ServerProcess(command, port=port, log=log, environment=environment) as server:
        server.wait_until_ready(timeout_s=600)
        yield server


class TestServer(SoakCases, SpokenCases, InsightCases, MediaCases, ServerCases):
    host = "sglang"
    release = sglang.__version__
    thinks_freely = True
    worker = "sglang::scheduler"
    metrics = ("sglang:prompt_tokens_total", "sglang:cache_hit_rate")
    audio_part: ClassVar = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}

    @pytest.mark.extended
    @pytest.mark.skipif(
        find_spec("datasets") is None,
        reason="SGLang's client imports datasets, which this environment leaves out",
    )
    def test_bench_serve_with_the_hosts_own_client(
        self, server: ServerProcess, constructed_checkpoint: Path, tmp_path: Path
    ) -> None:
        super().test_bench_serve_with_the_hosts_own_client(server, constructed_checkpoint, tmp_path)

    def saying(self, grammar: str) -> dict[str, Any]:
        return {"ebnf": grammar}

    def error_message(self, body: dict[str, Any]) -> str:
        return body["message"]

    def test_every_process_says_that_the_plugin_is_there(self, server: ServerProcess) -> None:
        lines = [line for line in server.log.read_text().splitlines() if "m3-plugin 0." in line]
        # launcher, scheduler and detokenizer
        assert sum("registered MiniMaxM3Sparse" in line for line in lines) == 3, lines
        serving = [line for line in lines if "serving MiniMax-M3 with 2 MSA" in line]
        assert len(serving) == 1, lines
        assert "kernels: " in serving[0]

    def decoded(self, server: ServerProcess, name: str) -> float:
        return counter(server, f"msa_{name}", label='phase="decode"')

    def test_blocks_read_stay_within_the_budget(
        self, server: ServerProcess, client: OpenAI
    ) -> None:
        """Top-4 of 128-token blocks: a decode row reads 4 blocks per layer and group, no more."""
        names = ("rows", "blocks_read", "blocks_visible")
        before = {name: self.decoded(server, name) for name in names}
        prompt = needle_prompt(707, num_tokens=6000)
        reply = ask(client, prompt.messages(), prompt.max_tokens)
        assert reply.choices[0].message.content == prompt.expected_text
        rows, read, visible = (self.decoded(server, n) - before[n] for n in names)
        layers, groups, topk = 2, 4, 4
        # SGLang starts one more step before it learns that a request has ended
        steps = rows / layers
        assert prompt.max_tokens - 1 <= steps <= prompt.max_tokens
        assert read == rows * groups * topk
        assert visible >= rows * groups * (6000 // 128 + 1)
