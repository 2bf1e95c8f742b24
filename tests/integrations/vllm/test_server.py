"""A real vLLM server over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from openai import OpenAI
from packaging.version import Version

from m3_plugin.host.serving import ServerProcess, free_port, vllm_command
from m3_vllm.compat import vllm_version
from tests.integrations.insight import InsightCases, insight_environment
from tests.integrations.media_cases import MediaCases
from tests.integrations.parser_corpus import Case
from tests.integrations.parsers import SpokenCases
from tests.integrations.server import MODEL, ServerCases
from tests.integrations.soak import SoakCases
from tests.integrations.vllm.engine import ENVIRONMENT

OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "8192"),
    *("--max-num-batched-tokens", "2048"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
    *("--limit-mm-per-prompt", '{"image": 2, "video": 1}'),
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    # wishes of a single request
    "--trust-request-mm-kwargs",
    *("--reasoning-parser", "minimax_m3"),
    # a constrained answer is constrained from its first word on, thoughts included
    *("--structured-outputs-config", '{"enable_in_reasoning": true}'),
)
TOOL_OPTIONS = ("--tool-call-parser", "minimax_m3", "--enable-auto-tool-choice")
# The parser of 0.31 wants an extension module that its CPU wheel was built without.
HAS_TOOL_PARSER = Version(vllm_version()) >= Version("0.32")
SERVER_ENVIRONMENT = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def server(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    port = free_port()
    options = OPTIONS + (TOOL_OPTIONS if HAS_TOOL_PARSER else ())
    command = vllm_command(constructed_checkpoint, port=port, options=options)
    folder = tmp_path_factory.mktemp("server")
    environment = SERVER_ENVIRONMENT | insight_environment(folder) | {"M3_PLUGIN_CHECK": "1"}
    log = folder / "server.log"
    with ServerProcess(command, port=port, log=log, environment=environment) as server:
        server.wait_until_ready(timeout_s=600)
        yield server


class TestServer(SoakCases, SpokenCases, InsightCases, MediaCases, ServerCases):
    host = "vllm"
    release = vllm_version()
    worker = "VLLM::Worker"
    metrics = ("vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total")
    audio_part: ClassVar = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}

    def saying(self, grammar: str) -> dict[str, Any]:
        return {"structured_outputs": {"grammar": grammar}}

    @pytest.mark.skipif(not HAS_TOOL_PARSER, reason="this vLLM was built without tool parsers")
    def test_spoken_replies_are_parsed(self, client: OpenAI, case: Case) -> None:
        super().test_spoken_replies_are_parsed(client, case)

    def error_message(self, body: dict[str, Any]) -> str:
        return body["error"]["message"]

    def test_every_process_says_that_the_plugin_is_there(self, server: ServerProcess) -> None:
        lines = [line for line in server.log.read_text().splitlines() if "m3-plugin 0." in line]
        registered = [line for line in lines if "registered" in line]
        # the API server speaks before vLLM labels its lines
        assert any("EngineCore" not in line and "Worker" not in line for line in registered), lines
        assert any("EngineCore" in line for line in registered), lines
        assert any("Worker" in line for line in registered), lines
        serving = [line for line in lines if "serving MiniMax-M3 with 2 MSA" in line]
        assert len(serving) == 1, lines
        assert "kernels: " in serving[0]

    @pytest.mark.skipif(not HAS_TOOL_PARSER, reason="this vLLM was built without tool parsers")
    def test_tools_and_reasoning_parsers_accept_a_request(self, client: OpenAI) -> None:
        super().test_tools_and_reasoning_parsers_accept_a_request(client)

    def test_an_unknown_model_is_refused(self, server: ServerProcess) -> None:
        body = {"model": "other", "messages": [{"role": "user", "content": "x"}]}
        assert "other" in self.refused(server, body)
