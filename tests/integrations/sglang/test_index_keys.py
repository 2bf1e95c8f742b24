"""Index keys with scales, in the slots of SGLang's own pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt
from m3_sglang.compat import speculation_is_tested
from tests.integrations.index_keys import STORED, require_right_answers_and_reused_pages
from tests.integrations.sglang.engine import EngineProcess, speculation
from tests.integrations.speculation import drafting_checkpoint, ids

SAID = {"int8": "index keys are kept in int8", "planes": "index keys are kept in two planes"}


@pytest.mark.parametrize("stored", STORED)
def test_answers_are_right_and_pages_are_reused(
    constructed_checkpoint: Path, tmp_path: Path, stored: dict[str, str]
) -> None:
    log = tmp_path / "engine.log"
    with EngineProcess(constructed_checkpoint, log=log, environment=stored) as engine:
        require_right_answers_and_reused_pages(engine)
        # said where the session meets the pool SGLang has made
        assert SAID[stored["M3_PLUGIN_INDEX_KEYS"]] in engine.log_text()


@pytest.mark.extended
@pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")
@pytest.mark.parametrize("stored", STORED)
def test_drafts_are_verified_on_them(tmp_path: Path, stored: dict[str, str]) -> None:
    """The module's own index keys are stored so as well."""
    checkpoint = drafting_checkpoint(tmp_path / "checkpoint", wrong_every=2)
    with EngineProcess(
        checkpoint,
        log=tmp_path / "engine.log",
        environment=stored,
        **speculation(checkpoint, steps=3),
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        accepted = sum(output.num_accepted for output in outputs)
        assert 0 < accepted < 3 * sum(output.num_verify_steps for output in outputs)
        # of the target, and of the module
        assert engine.log_text().count(SAID[stored["M3_PLUGIN_INDEX_KEYS"]]) >= 2
