"""Random checkpoints through the real engine against transformers in fp32: tokens and logprobs.

Prompts reach past the block budget, where a wrong selection shows; below it MSA equals dense.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.integrations import golden
from tests.integrations.sglang.engine import EngineProcess

# SGLang and transformers sum in different orders; measured differences stay below 2e-5.
LOGPROB_ATOL = 2e-4

beyond_the_budget = pytest.mark.skipif(
    Version(importlib.metadata.version("transformers")) < Version("5.19"),
    reason="transformers 5.12 chooses the same blocks for all heads, which M3 does not; "
    "test_recorded.py compares with the answers of 5.19",
)


def random_prompt(length: int, *, seed: int, vocabulary: int = 400) -> list[int]:
    """Token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, vocabulary, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("engine")


@pytest.mark.every_release
@pytest.mark.parametrize(
    "length",
    [1, 127, 128, 129, *(pytest.param(n, marks=beyond_the_budget) for n in (511, 512, 513, 1300))],
)
def test_greedy_tokens_equal_transformers(
    random_engine: EngineProcess, checkpoint: Path, length: int
) -> None:
    prompt = random_prompt(length, seed=length)
    (ours,) = random_engine.generate([prompt], max_tokens=12, ignore_eos=True)
    assert ours.token_ids == golden.greedy(checkpoint, prompt, num_tokens=12)


def test_batched_greedy_tokens_equal_transformers(
    random_engine: EngineProcess, checkpoint: Path
) -> None:
    prompts = [random_prompt(n, seed=100 + n) for n in (3, 200, 700, 1000)]
    limits = [9, 5, 7, 3]
    outputs = random_engine.generate(prompts, max_tokens=limits, ignore_eos=True)
    for prompt, limit, ours in zip(prompts, limits, outputs, strict=True):
        assert ours.token_ids == golden.greedy(checkpoint, prompt, num_tokens=limit)


@beyond_the_budget
@pytest.mark.every_release
def test_prompt_logprobs_equal_transformers(random_engine: EngineProcess, checkpoint: Path) -> None:
    prompt = random_prompt(1500, seed=7)
    torch.testing.assert_close(
        torch.tensor(random_engine.prompt_logprobs(prompt)),
        golden.token_logprobs(checkpoint, prompt),
        atol=LOGPROB_ATOL,
        rtol=0,
    )


@pytest.mark.extended  # the demo serves in bf16 as well
def test_bf16_follows_fp32_teacher_forced(checkpoint: Path, tmp_path: Path) -> None:
    """bf16 flips single router or block choices, so means are compared, not maxima."""
    prompt = random_prompt(1500, seed=9)
    with EngineProcess(checkpoint, log=tmp_path / "engine.log", dtype="bfloat16") as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
    difference = (ours - golden.token_logprobs(checkpoint, prompt)).abs()
    assert difference.mean() <= 0.05


@pytest.mark.extended
def test_layers_declared_dense_are_dense(checkpoint: Path, tmp_path: Path) -> None:
    """The reference chooses all 11 blocks instead; index weights of the checkpoint are not read."""
    prompt = random_prompt(1300, seed=11)
    dense = golden.with_sparse_config(checkpoint, tmp_path / "dense", use_sparse_attention=False)
    chosen = golden.with_sparse_config(checkpoint, tmp_path / "all", sparse_topk_blocks=16)
    with EngineProcess(dense, log=tmp_path / "engine.log") as engine:
        (ours,) = engine.generate([prompt], max_tokens=12, ignore_eos=True)
    expected = golden.greedy(chosen, prompt, num_tokens=12)
    assert ours.token_ids == expected
    assert expected != golden.greedy(checkpoint, prompt, num_tokens=12)
