"""LoRA adapters through a real engine: answers are those of the merged weights in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from m3_plugin.host.serving import ServerProcess, free_port, vllm_command
from tests.integrations import golden
from tests.integrations.adapters import (
    REFUSED,
    Adapter,
    two_adapters,
    write_adapter,
    write_cut_adapter,
)
from tests.integrations.cases import random_prompt
from tests.integrations.parity import require_close
from tests.integrations.vllm.engine import EngineError, EngineProcess
from tests.integrations.vllm.test_server import OPTIONS, SERVER_ENVIRONMENT

# Beyond the block budget of the checkpoint, where another index projection chooses other blocks.
LENGTH = 700


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("engine")


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return two_adapters(checkpoint, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(
        checkpoint,
        max_num_batched_tokens=512,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        # the tower is there, whose layers have names of projections too
        limit_mm_per_prompt={"image": 1, "video": 0},
    ) as engine:
        yield engine


def test_answers_are_those_of_the_merged_weights(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    """Two adapters and none in one batch, the same prompt for all, in chunks of 512."""
    prompt = random_prompt(LENGTH, seed=41)
    folders = [adapters[0].folder, adapters[1].folder, None]
    outputs = engine.generate(
        [prompt] * 3, max_tokens=8, ignore_eos=True, logprobs=0, adapters=folders
    )
    answers = []
    for output, weights in zip(
        outputs, (adapters[0].merged, adapters[1].merged, checkpoint), strict=True
    ):
        expected = golden.greedy(weights, prompt, num_tokens=8)
        assert output.token_ids == expected
        whole = golden.token_logprobs(weights, prompt + expected)[-8:]
        ours = [step[token] for step, token in zip(output.logprobs, expected, strict=True)]
        require_close(ours, whole)
        answers.append(whole)
    # an adapter of the index branch changes nothing but which blocks are read
    assert all((answer - answers[2]).abs().max() > 1e-2 for answer in answers[:2])


def test_prefixes_are_not_shared_between_adapters(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    prompt = random_prompt(LENGTH, seed=42)
    expected = [
        golden.greedy(path, prompt, num_tokens=4) for path in (checkpoint, adapters[0].merged)
    ]
    cached = []
    for _ in range(2):
        for folder, tokens in zip((None, adapters[0].folder), expected, strict=True):
            (output,) = engine.generate([prompt], max_tokens=4, ignore_eos=True, adapters=[folder])
            assert output.token_ids == tokens
            cached.append(output.num_cached_tokens >= 512)
    assert cached == [False, False, True, True]


def test_weights_stay_while_adapters_are_served(engine: EngineProcess, checkpoint: Path) -> None:
    """vLLM's layers around ours have other names for the weights, and none of an update's."""
    prompt = random_prompt(40, seed=43)
    (before,) = engine.generate([prompt], max_tokens=4, ignore_eos=True)
    with pytest.raises(EngineError, match="leave out --enable-lora"):
        engine.rpc("reload_weights")
    (after,) = engine.generate([prompt], max_tokens=4, ignore_eos=True)
    assert after.token_ids == before.token_ids


@pytest.mark.parametrize(("module", "reason"), REFUSED)
def test_what_would_be_passed_over_is_refused(
    engine: EngineProcess, adapters: list[Adapter], tmp_path: Path, module: str, reason: str
) -> None:
    """And the server goes on."""
    pair = {module: (torch.zeros(8, 16), torch.zeros(16, 8))}
    folder = write_adapter(tmp_path / "adapter", pair)
    with pytest.raises(EngineError, match=reason):
        engine.add_adapter(folder)
    (output,) = engine.generate(
        [random_prompt(5, seed=1)], max_tokens=1, adapters=[adapters[0].folder]
    )
    assert len(output.token_ids) == 1


@pytest.mark.parametrize("half", [0, 1])
def test_a_wrong_shape_is_refused(
    engine: EngineProcess, checkpoint: Path, tmp_path: Path, half: int
) -> None:
    """vLLM would copy it into a corner of its buffer and answer."""
    folder = write_cut_adapter(checkpoint, tmp_path / "adapter", half=half)
    with pytest.raises(EngineError, match=r"o_proj\.lora_[AB]\.weight must have shape"):
        engine.add_adapter(folder)


def completion(server: ServerProcess, model: str, prompt: list[int]) -> list[int]:
    reply = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "model": model,
            "prompt": prompt,
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
        timeout=600,
        trust_env=False,
    )
    reply.raise_for_status()
    return reply.json()["choices"][0]["token_ids"]


@pytest.mark.extended
def test_adapters_come_and_go_over_http(
    checkpoint: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    prompt = random_prompt(LENGTH, seed=44)
    bad = write_adapter(tmp_path / "bad", {"lm_head": (torch.zeros(8, 16), torch.zeros(16, 8))})
    port = free_port()
    options = (*OPTIONS, "--enable-lora", "--max-lora-rank", "8", "--max-model-len", "2048")
    environment = {**SERVER_ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with ServerProcess(
        vllm_command(checkpoint, port=port, options=options),
        port=port,
        log=tmp_path / "server.log",
        environment=environment,
    ) as server:
        server.wait_until_ready()

        def post(path: str, **body: str) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=600, trust_env=False)

        base = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"][0]["id"]
        plain = golden.greedy(checkpoint, prompt, num_tokens=4)
        assert completion(server, base, prompt) == plain
        for name, adapter in zip("ab", adapters, strict=True):
            loaded = post("load_lora_adapter", lora_name=name, lora_path=str(adapter.folder))
            assert loaded.status_code == 200, loaded.text
            expected = golden.greedy(adapter.merged, prompt, num_tokens=4)
            assert completion(server, name, prompt) == expected
        refused = post("load_lora_adapter", lora_name="c", lora_path=str(bad))
        # vLLM's answer to every adapter that an engine does not load
        assert refused.status_code == 500
        assert "lm_head" in refused.text
        assert post("unload_lora_adapter", lora_name="a").status_code == 200
        assert post("completions", model="a", prompt="x").status_code == 404
        assert completion(server, base, prompt) == plain


@pytest.mark.extended
def test_two_ranks(checkpoint: Path, adapters: list[Adapter]) -> None:
    prompt = random_prompt(LENGTH, seed=45)
    with EngineProcess(
        checkpoint,
        max_num_batched_tokens=512,
        enable_lora=True,
        max_lora_rank=8,
        tensor_parallel_size=2,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as engine:
        outputs = engine.generate(
            [prompt] * 2, max_tokens=4, ignore_eos=True, adapters=[adapters[0].folder, None]
        )
    for output, weights in zip(outputs, (adapters[0].merged, checkpoint), strict=True):
        assert output.token_ids == golden.greedy(weights, prompt, num_tokens=4)
