"""Index keys in int8: half the bytes, in pages that vLLM allocates, shares and frees as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.speculation import drafting_checkpoint, ids
from tests.integrations.vllm.engine import EngineProcess

PAGE = 128


def test_answers_are_right_and_pages_are_reused(constructed_checkpoint: Path) -> None:
    """Far beyond the budget, in chunks, in company, and from the prefix cache."""
    chain = needle_prompt(4096, num_tokens=4096)
    company = [needle_prompt(seed, num_tokens=1400 + 333 * seed) for seed in range(1, 5)]
    with EngineProcess(
        constructed_checkpoint,
        max_model_len=16384,
        max_num_batched_tokens=2048,
        environment={"M3_PLUGIN_INDEX_KEYS": "int8"},
    ) as engine:
        assert engine.rpc("m3_index_dtype") == ["torch.int8"]
        prompts = [chain, *company]
        outputs = engine.generate(
            [list(prompt.token_ids) for prompt in prompts],
            max_tokens=[prompt.max_tokens for prompt in prompts],
        )
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        assert chain.dense_answer not in (None, outputs[0].text)
        (again,) = engine.generate([list(chain.token_ids)], max_tokens=chain.max_tokens)
        assert tuple(again.token_ids) == chain.expected_ids
        assert again.num_cached_tokens == (4096 - 1) // PAGE * PAGE


@pytest.mark.extended
def test_drafts_are_verified_on_them(tmp_path: Path) -> None:
    """The module's own index keys are in int8 as well."""
    with EngineProcess(
        drafting_checkpoint(tmp_path / "checkpoint", wrong_every=3),
        environment={"M3_PLUGIN_INDEX_KEYS": "int8"},
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        drafts = engine.speculation()
        assert 0 < drafts.accepted < drafts.drafted
