"""Two ranks over gloo: heads split, and heads shared where there are fewer than ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3_plugin.testing.random_checkpoint import PRESETS, write_random_checkpoint
from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.sglang.engine import EngineProcess

TWO_RANKS = {
    "tp_size": 2,
    "environment": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
}


def test_each_rank_holds_its_heads(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two KV heads and index heads per rank, one copy of the index keys on each.

    The checkpoint has the published numbers: top-16 of 128-token blocks, 16/4 heads; the prompt
    really crosses the budget of 2,048 tokens.
    """
    checkpoint = random_checkpoint("kernel")
    prompt = random_prompt(2500, seed=5)
    with EngineProcess(
        checkpoint, log=tmp_path / "engine.log", chunked_prefill_size=1024, **TWO_RANKS
    ) as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
        assert engine.log_text().count("serving MiniMax-M3 with 3 MSA") == 2
    torch.testing.assert_close(
        ours, golden.token_logprobs(checkpoint, prompt), atol=LOGPROB_ATOL, rtol=0
    )


@pytest.mark.extended
def test_ranks_share_a_head(tmp_path: Path) -> None:
    """One KV head and index head for two ranks: both hold it, and nothing counts twice."""
    shape = replace(PRESETS["engine"], num_key_value_heads=1)
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", preset=shape)
    prompt = random_prompt(1300, seed=11)
    with EngineProcess(checkpoint, log=tmp_path / "engine.log", **TWO_RANKS) as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
    torch.testing.assert_close(
        ours, golden.token_logprobs(checkpoint, prompt), atol=LOGPROB_ATOL, rtol=0
    )
