"""Index keys in int8: half the bytes, in the slots of SGLang's own pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt
from m3_sglang.compat import speculation_is_tested
from tests.integrations.sglang.engine import EngineProcess, speculation
from tests.integrations.speculation import drafting_checkpoint, ids

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


@pytest.mark.extended
@pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")
def test_drafts_are_verified_on_them(tmp_path: Path) -> None:
    """The module's own index keys are in int8 as well."""
    checkpoint = drafting_checkpoint(tmp_path / "checkpoint", wrong_every=3)
    with EngineProcess(
        checkpoint,
        log=tmp_path / "engine.log",
        environment={"M3_PLUGIN_INDEX_KEYS": "int8"},
        **speculation(checkpoint, steps=3),
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        accepted = sum(output.num_accepted for output in outputs)
        assert 0 < accepted < 3 * sum(output.num_verify_steps for output in outputs)
        assert engine.log_text().count("index keys are kept in int8") == 2
