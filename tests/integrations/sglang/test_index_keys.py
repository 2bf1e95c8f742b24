"""Index keys in int8: half the bytes, in the slots of SGLang's own pool."""

from __future__ import annotations

from pathlib import Path

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.sglang.engine import EngineProcess

PAGE = 128


def test_answers_are_right_and_pages_are_reused(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    """Far beyond the budget, in chunks, in company, and from the radix cache."""
    chain = needle_prompt(4096, num_tokens=4096)
    company = [needle_prompt(seed, num_tokens=1400 + 333 * seed) for seed in range(1, 5)]
    with EngineProcess(
        constructed_checkpoint,
        log=tmp_path / "engine.log",
        context_length=16384,
        max_total_tokens=24576,
        environment={"M3_PLUGIN_INDEX_KEYS": "int8"},
    ) as engine:
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
        # said where the session meets the pool SGLang has made
        assert "index keys are kept in int8" in engine.log_text()
