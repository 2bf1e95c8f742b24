"""Index keys in int8: half the bytes, in the slots of SGLang's own pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt
from m3_sglang.compat import speculation_is_tested
from tests.integrations.index_keys import INT8, require_right_answers_and_reused_pages
from tests.integrations.sglang.engine import EngineProcess, speculation
from tests.integrations.speculation import drafting_checkpoint, ids


def test_answers_are_right_and_pages_are_reused(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    log = tmp_path / "engine.log"
    with EngineProcess(constructed_checkpoint, log=log, environment=INT8) as engine:
        require_right_answers_and_reused_pages(engine)
        # said where the session meets the pool SGLang has made
        assert "index keys are kept in int8" in engine.log_text()


@pytest.mark.extended
@pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")
def test_drafts_are_verified_on_them(tmp_path: Path) -> None:
    """The module's own index keys are in int8 as well."""
    checkpoint = drafting_checkpoint(tmp_path / "checkpoint", wrong_every=2)
    with EngineProcess(
        checkpoint,
        log=tmp_path / "engine.log",
        environment=INT8,
        **speculation(checkpoint, steps=3),
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        accepted = sum(output.num_accepted for output in outputs)
        assert 0 < accepted < 3 * sum(output.num_verify_steps for output in outputs)
        # of the target, and of the module
        assert engine.log_text().count("index keys are kept in int8") >= 2
