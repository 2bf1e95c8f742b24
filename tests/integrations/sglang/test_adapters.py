"""LoRA adapters through a real engine: answers are those of the merged weights in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.integrations import golden
from tests.integrations.adapters import REFUSED, Adapter, draw, two_adapters, write_adapter
from tests.integrations.cases import random_prompt
from tests.integrations.parity import require_close
from tests.integrations.sglang.engine import EngineProcess

# Beyond the block budget of the checkpoint, where another index projection chooses other blocks.
LENGTH = 700
OPTIONS = {
    "chunked_prefill_size": 512,
    "enable_lora": True,
    "max_lora_rank": 16,
    "max_loras_per_batch": 3,
    "lora_target_modules": ["all"],
}


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("engine")


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return two_adapters(checkpoint, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(
    checkpoint: Path, adapters: list[Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("log") / "engine.log"
    with EngineProcess(checkpoint, log=log, **OPTIONS) as engine:
        for name, adapter in zip("ab", adapters, strict=True):
            assert engine.load_adapter(name, adapter.folder) == (True, "")
        yield engine


def asked(prompt: list[int], adapter: str | None) -> dict[str, object]:
    return {"input_ids": prompt, "lora_path": adapter}


def test_answers_are_those_of_the_merged_weights(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    """Two adapters and none in one batch, the same prompt for all, in chunks of 512."""
    prompt = random_prompt(LENGTH, seed=41)
    names = ["a", "b", None]
    weights = [adapters[0].merged, adapters[1].merged, checkpoint]
    outputs = engine.generate(
        [asked(prompt, name) for name in names], max_tokens=8, ignore_eos=True
    )
    answers = []
    for output, name, folder in zip(outputs, names, weights, strict=True):
        assert output.token_ids == golden.greedy(folder, prompt, num_tokens=8)
        whole = golden.token_logprobs(folder, prompt)
        engine.flush()
        require_close(engine.prompt_logprobs(asked(prompt, name)), whole)
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
        for name, tokens in zip((None, "a"), expected, strict=True):
            (output,) = engine.generate([asked(prompt, name)], max_tokens=4, ignore_eos=True)
            assert output.token_ids == tokens
            cached.append(output.num_cached_tokens >= 512)
    assert cached == [False, False, True, True]


@pytest.mark.parametrize(("module", "reason"), REFUSED)
def test_what_would_be_passed_over_is_refused(
    engine: EngineProcess, tmp_path: Path, module: str, reason: str
) -> None:
    """And the server goes on."""
    folder = write_adapter(tmp_path / "adapter", {module: (torch.zeros(8, 16), torch.zeros(16, 8))})
    require_refused(engine, folder, reason)


@pytest.mark.parametrize("half", [0, 1])
def test_a_wrong_shape_is_refused_when_an_adapter_is_loaded(
    engine: EngineProcess, checkpoint: Path, tmp_path: Path, half: int
) -> None:
    """SGLang looks at shapes when the first request comes, and its scheduler ends."""
    pairs = draw(checkpoint, ["o_proj"], seed=7)
    cut = {
        name: tuple(part[:, :-1] if i == half else part for i, part in enumerate(pair))
        for name, pair in pairs.items()
    }
    folder = write_adapter(tmp_path / "adapter", cut)
    require_refused(engine, folder, "o_proj.lora_[AB].weight must have shape")


def require_refused(engine: EngineProcess, folder: Path, reason: str) -> None:
    success, message = engine.load_adapter("c", folder)
    assert not success
    assert re.search(reason, message), message
    (output,) = engine.generate([asked(random_prompt(5, seed=1), "a")], max_tokens=1)
    assert len(output.token_ids) == 1


def test_adapters_come_and_go(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    """An adapter under another name, gone again; one that lacks a part of a fused layer."""
    prompt = random_prompt(LENGTH, seed=44)
    plain = golden.greedy(checkpoint, prompt, num_tokens=4)
    assert engine.load_adapter("c", adapters[1].folder)[0]
    (output,) = engine.generate([asked(prompt, "c")], max_tokens=4, ignore_eos=True)
    assert output.token_ids == golden.greedy(adapters[1].merged, prompt, num_tokens=4)
    assert engine.unload_adapter("c")[0]
    (output,) = engine.generate([asked(prompt, None)], max_tokens=4, ignore_eos=True)
    assert output.token_ids == plain
