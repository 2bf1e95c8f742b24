"""Adapters and weights that change, over HTTP: SGLang's own routes of one server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_plugin.host.serving import ServerProcess, free_port, sglang_command
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations import golden
from tests.integrations.adapters import two_adapters, write_adapter
from tests.integrations.cases import random_prompt
from tests.integrations.parity import require_close
from tests.integrations.server import MODEL
from tests.integrations.sglang.engine import ENVIRONMENT, checkpoint_tensors, trainer_group
from tests.integrations.updates import (
    EXPERT,
    FUSED,
    PROMPT,
    ServedCheckpoint,
    without_tensor,
)

pytestmark = pytest.mark.extended

OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--device", "cpu"),
    *("--context-length", "4096"),
    *("--max-total-tokens", "8192"),
    *("--max-running-requests", "4"),
    *("--mem-fraction-static", "0.1"),
    *("--chunked-prefill-size", "512"),
    *("--max-lora-rank", "8"),
    *("--max-loras-per-batch", "3"),
    *("--lora-target-modules", "all"),
    "--enable-lora",
    "--sleep-on-idle",
)


class Client(ServedCheckpoint):
    """Asks the server."""

    def logprobs(self, prompt: list[int], adapter: str | None = None) -> list[float]:
        """Of every prompt token after the first, none of them cached."""
        assert self.post("flush_cache").status_code == 200
        reply = self.post(
            "generate",
            input_ids=prompt,
            lora_path=adapter,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        reply.raise_for_status()
        return [entry[0] for entry in reply.json()["meta_info"]["input_token_logprobs"]][1:]

    def back(self, first: list[float]) -> None:
        """The original's folder again, bit for bit."""
        reply = self.post("update_weights_from_disk", model_path=str(self.original))
        assert reply.status_code == 200, reply.text
        assert self.logprobs(PROMPT) == first


@pytest.fixture(scope="module")
def client(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    checkpoint, port = random_checkpoint("engine"), free_port()
    command = sglang_command(checkpoint, port=port, options=OPTIONS)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(command, port=port, log=log, environment=ENVIRONMENT) as server:
        server.wait_until_ready(timeout_s=600)
        yield Client(server, checkpoint)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other numbers under the same names."""
    folder = tmp_path_factory.mktemp("other") / "engine"
    return write_random_checkpoint(folder, preset="engine", seed=5)


def test_adapters_come_and_go(client: Client, tmp_path: Path) -> None:
    prompt = random_prompt(700, seed=44)
    adapter, _ = two_adapters(client.original, tmp_path)
    bad = write_adapter(tmp_path / "bad", {"lm_head": (torch.zeros(8, 16), torch.zeros(16, 8))})
    plain = client.logprobs(prompt)
    loaded = client.post("load_lora_adapter", lora_name="a", lora_path=str(adapter.folder))
    assert loaded.status_code == 200, loaded.text
    require_close(client.logprobs(prompt, "a"), golden.token_logprobs(adapter.merged, prompt))
    refused = client.post("load_lora_adapter", lora_name="b", lora_path=str(bad))
    assert refused.status_code == 400
    assert "lm_head" in refused.text
    assert client.post("unload_lora_adapter", lora_name="a").status_code == 200
    # SGLang loads one that it has known again when it is asked for
    assert client.post("generate", text="x", lora_path="nobody").status_code == 400
    assert client.logprobs(prompt) == plain


def test_weights_change(client: Client, other_checkpoint: Path, tmp_path: Path) -> None:
    first = client.logprobs(PROMPT)
    reply = client.post("update_weights_from_disk", model_path=str(other_checkpoint))
    assert reply.status_code == 200, reply.text
    reloaded = client.logprobs(PROMPT)
    assert reloaded != first
    client.back(first)
    tensors = checkpoint_tensors(other_checkpoint)
    for send in (send_tensors, broadcast):
        send(client, tensors)
        assert client.logprobs(PROMPT) == reloaded
        client.back(first)


def test_what_is_refused_leaves_the_old_weights(
    client: Client, other_checkpoint: Path, tmp_path: Path
) -> None:
    first = client.logprobs(PROMPT)
    broken = without_tensor(other_checkpoint, tmp_path / "broken", EXPERT)
    tensor = checkpoint_tensors(other_checkpoint)[FUSED[0]]
    sent = serialised([(FUSED[0], tensor[:-1].clone())])
    whole = serialised([(FUSED[0], tensor)])
    asked = [
        ("disk", {"model_path": str(broken)}, "missing 1 tensor"),
        ("disk", {"model_path": str(tmp_path / "nowhere")}, "nowhere"),
        ("tensor", {"serialized_named_tensors": sent}, "q_proj.weight must have shape"),
        ("tensor", {"serialized_named_tensors": whole, "load_format": "direct"}, "load_format"),
        (
            "distributed",
            {"names": FUSED[:1], "dtypes": ["float32"], "shapes": [list(tensor.shape)]},
            "init_weights_update_group",
        ),
    ]
    assert client.post("begin_weight_update").status_code == 200
    for route, body, said in asked:
        reply = client.post(f"update_weights_from_{route}", **body)
        assert reply.status_code == 400, reply.text
        assert said in reply.text
    assert client.post("end_weight_update").status_code == 200
    assert client.logprobs(PROMPT) == first


def test_memory_is_asked_back_and_given_again(client: Client) -> None:
    """Without `--enable-memory-saver`, which a CPU has not, nothing is given back or lost."""
    first = client.logprobs(PROMPT)
    assert client.post("release_memory_occupation").status_code == 200
    assert client.post("resume_memory_occupation").status_code == 200
    assert client.logprobs(PROMPT) == first


def serialised(named: list[tuple[str, torch.Tensor]]) -> list[str]:
    """Tensors as SGLang's client sends them to a server of another parent."""
    from sglang.srt.utils import MultiprocessingSerializer

    torch.multiprocessing.set_sharing_strategy("file_system")
    return [str(MultiprocessingSerializer.serialize(named, output_str=True))]


def send_tensors(client: Client, tensors: dict[str, torch.Tensor]) -> None:
    """All tensors in buckets of twenty."""
    assert client.post("begin_weight_update").status_code == 200
    named = list(tensors.items())
    for start in range(0, len(named), 20):
        body = {"serialized_named_tensors": serialised(named[start : start + 20])}
        reply = client.post("update_weights_from_tensor", **body)
        assert reply.status_code == 200, reply.text
    assert client.post("end_weight_update").status_code == 200


def broadcast(client: Client, tensors: dict[str, torch.Tensor]) -> None:
    """All tensors over a gloo group in which this process is the trainer."""
    port, name = free_port(), "trainer"
    with ThreadPoolExecutor(1) as trainer:
        joined = trainer.submit(trainer_group, port, name)
        reply = client.post(
            "init_weights_update_group",
            master_address="127.0.0.1",
            master_port=port,
            rank_offset=1,
            world_size=2,
            group_name=name,
            backend="gloo",
        )
        assert reply.status_code == 200, reply.text
        group: Any = joined.result(60)
        assert client.post("begin_weight_update").status_code == 200

        def send() -> None:
            for tensor in tensors.values():
                torch.distributed.broadcast(tensor, src=0, group=group)

        sent = trainer.submit(send)
        reply = client.post(
            "update_weights_from_distributed",
            names=list(tensors),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            shapes=[list(tensor.shape) for tensor in tensors.values()],
            group_name=name,
        )
        sent.result(60)
    assert reply.status_code == 200, reply.text
    assert client.post("end_weight_update").status_code == 200
    assert client.post("destroy_weights_update_group", group_name=name).status_code == 200
