"""Random checkpoints through a real engine against transformers in fp32: one list for all hosts.

Prompts reach past the block budget, where a wrong selection shows; below it MSA equals dense. A
host's `test_parity.py` derives `ParityCases`, with its engine on the checkpoint of preset `engine`
in the fixture `engine`, and says how it starts others.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, Case, random_prompt, recorded

beyond_the_budget = pytest.mark.skipif(
    Version(importlib.metadata.version("transformers")) < Version("5.19"),
    reason="transformers before 5.19 chooses the same blocks for all heads, which M3 does not; "
    "the record compares with the answers of 5.19",
)


def require_close(ours: list[float] | torch.Tensor, expected: list[float] | torch.Tensor) -> None:
    """Equal log probabilities, but for the order in which hosts sum."""
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(expected), atol=LOGPROB_ATOL, rtol=0
    )


class ParityCases:
    """Tokens and log probabilities of text."""

    def dense_rows(self, engine: Any) -> int:
        """Rows that dense layers have served on our kernel, times those layers."""
        raise NotImplementedError

    def start(self, checkpoint: Path, folder: Path, **options: Any) -> AbstractContextManager[Any]:
        """The host's engine on another checkpoint, or with other options."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def checkpoint(self, random_checkpoint: Callable[[str], Path]) -> Path:
        return random_checkpoint("engine")

    @pytest.mark.every_release
    @pytest.mark.parametrize(
        "length",
        [
            1,
            127,
            128,
            129,
            *(pytest.param(n, marks=beyond_the_budget) for n in (511, 512, 513, 1300)),
        ],
    )
    def test_greedy_tokens_equal_transformers(
        self, engine: Any, checkpoint: Path, length: int
    ) -> None:
        prompt = random_prompt(length, seed=length)
        (ours,) = engine.generate([prompt], max_tokens=12, ignore_eos=True)
        assert ours.token_ids == golden.greedy(checkpoint, prompt, num_tokens=12)

    @pytest.mark.every_release
    def test_dense_layers_run_on_our_kernel(self, engine: Any) -> None:
        """Prompt and answer, in the one dense layer of this checkpoint."""
        before = self.dense_rows(engine)
        engine.generate([random_prompt(300, seed=300)], max_tokens=5, ignore_eos=True)
        assert self.dense_rows(engine) - before == 304

    @beyond_the_budget
    def test_batched_greedy_tokens_equal_transformers(self, engine: Any, checkpoint: Path) -> None:
        prompts = [random_prompt(n, seed=100 + n) for n in (3, 200, 700, 1000)]
        limits = [9, 5, 7, 3]
        outputs = engine.generate(prompts, max_tokens=limits, ignore_eos=True)
        for prompt, limit, ours in zip(prompts, limits, outputs, strict=True):
            assert ours.token_ids == golden.greedy(checkpoint, prompt, num_tokens=limit)

    @beyond_the_budget
    @pytest.mark.every_release
    def test_prompt_logprobs_equal_transformers(self, engine: Any, checkpoint: Path) -> None:
        # none of its choices is a tie: transformers says the same with its eager attention
        prompt = random_prompt(1500, seed=8)
        require_close(engine.prompt_logprobs(prompt), golden.token_logprobs(checkpoint, prompt))

    @pytest.mark.every_release
    @pytest.mark.parametrize("case", recorded(), ids=lambda case: f"{case['length']} tokens")
    def test_the_record_every_host_must_give(self, engine: Any, case: Case) -> None:
        prompt = random_prompt(case["length"], seed=case["seed"])
        (ours,) = engine.generate([prompt], max_tokens=len(case["token_ids"]), ignore_eos=True)
        assert ours.token_ids == case["token_ids"]
        require_close(engine.prompt_logprobs(prompt), case["logprobs"])

    @pytest.mark.extended  # the demo serves in bf16 as well
    def test_bf16_follows_fp32_teacher_forced(self, checkpoint: Path, tmp_path: Path) -> None:
        """bf16 flips single router or block choices, so means are compared, not maxima."""
        prompt = random_prompt(1500, seed=9)
        with self.start(checkpoint, tmp_path, dtype="bfloat16") as engine:
            ours = torch.tensor(engine.prompt_logprobs(prompt))
        difference = (ours - golden.token_logprobs(checkpoint, prompt)).abs()
        assert difference.mean() <= 0.05

    @pytest.mark.extended
    def test_layers_declared_dense_are_dense(self, checkpoint: Path, tmp_path: Path) -> None:
        """The reference chooses all 11 blocks instead; index weights are not read."""
        prompt = random_prompt(1300, seed=11)
        dense = golden.with_sparse_config(
            checkpoint, tmp_path / "dense", use_sparse_attention=False
        )
        chosen = golden.with_sparse_config(checkpoint, tmp_path / "all", sparse_topk_blocks=16)
        with self.start(dense, tmp_path) as engine:
            (ours,) = engine.generate([prompt], max_tokens=12, ignore_eos=True)
        expected = golden.greedy(chosen, prompt, num_tokens=12)
        assert ours.token_ids == expected
        assert expected != golden.greedy(checkpoint, prompt, num_tokens=12)
