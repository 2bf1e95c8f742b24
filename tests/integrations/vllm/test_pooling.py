"""Embeddings of prompts: the last hidden state, with no output head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.updates import PROMPT
from tests.integrations.vllm.engine import EngineProcess


@pytest.mark.extended
def test_a_prompt_beyond_the_budget_is_embedded(
    random_checkpoint: Callable[[str], Path],
) -> None:
    with EngineProcess(random_checkpoint("engine"), runner="pooling", convert="embed") as engine:
        first, other = engine.embed(PROMPT), engine.embed(PROMPT[::-1])
        # its prefix cached; vLLM's own dense layer sums in another order
        assert engine.embed(PROMPT) == pytest.approx(first, abs=1e-5)
    assert first != other
    assert abs(sum(value**2 for value in first) - 1) < 1e-3
