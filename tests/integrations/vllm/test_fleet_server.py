"""Weights that change over HTTP: vLLM's own routes of one server (`VLLM_SERVER_DEV_MODE=1`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from m3_plugin.host.serving import ServerProcess, free_port, vllm_command
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations.server import MODEL
from tests.integrations.updates import (
    EXPERT,
    PROMPT,
    ServedCheckpoint,
    with_nan,
    without_tensor,
)
from tests.integrations.vllm.test_server import SERVER_ENVIRONMENT

pytestmark = pytest.mark.extended

OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "2048"),
    *("--max-num-batched-tokens", "512"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
    "--enforce-eager",
)


class Client(ServedCheckpoint):
    """Asks the server."""

    def reload(self, folder: Path) -> httpx.Response:
        return self.post(
            "collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)}
        )

    def logprobs(self, prompt: list[int]) -> list[float]:
        """Of every prompt token after the first, none of them cached."""
        assert self.post("reset_prefix_cache").status_code == 200
        reply = self.post(
            "v1/completions",
            model=MODEL,
            prompt=prompt,
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
        )
        reply.raise_for_status()
        steps = reply.json()["choices"][0]["prompt_logprobs"][1:]
        return [step[str(token)]["logprob"] for step, token in zip(steps, prompt[1:], strict=True)]


@pytest.fixture(scope="module")
def client(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    checkpoint, port = random_checkpoint("engine"), free_port()
    environment = {**SERVER_ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"}
    with ServerProcess(
        vllm_command(checkpoint, port=port, options=OPTIONS),
        port=port,
        log=tmp_path_factory.mktemp("server") / "server.log",
        environment=environment,
    ) as server:
        server.wait_until_ready(timeout_s=600)
        yield Client(server, checkpoint)


def test_folders_come_over_http(client: Client, tmp_path: Path) -> None:
    """Another folder and back to the same bits; broken ones answer with the tensor's name."""
    other = write_random_checkpoint(tmp_path / "other", preset="engine", seed=5)
    first = client.logprobs(PROMPT)
    assert client.post("pause?mode=wait").status_code == 200
    assert client.reload(other).status_code == 200
    assert client.post("resume").status_code == 200
    assert client.logprobs(PROMPT) != first
    assert client.reload(client.original).status_code == 200
    assert client.logprobs(PROMPT) == first
    short = EXPERT.removeprefix("language_model.").removesuffix(".weight")
    for broken, said in (
        (without_tensor(other, tmp_path / "short", EXPERT), f"missing 1 tensor(s): {short}"),
        (with_nan(other, tmp_path / "nan", EXPERT), f"{EXPERT} holds 1 values that are NaN"),
    ):
        reply = client.reload(broken)
        assert reply.status_code >= 400
        assert said in reply.text
        assert client.logprobs(PROMPT) == first


def test_engines_that_move_weights_on_gpus_alone_are_answered(client: Client) -> None:
    """Without `--weight-transfer-config` as with one: none of vLLM's runs on a CPU."""
    first = client.logprobs(PROMPT)
    reply = client.post("start_weight_update")
    assert reply.status_code >= 400
    assert "weight_transfer" in reply.text.lower().replace(" ", "_")
    assert client.logprobs(PROMPT) == first
