"""Index keys with scales, in pages that vLLM allocates, shares and frees as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.attention.backends import INDEX_KEYS
from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.index_keys import STORED, require_right_answers_and_reused_pages
from tests.integrations.speculation import drafting_checkpoint, ids
from tests.integrations.vllm.engine import EngineProcess


@pytest.mark.parametrize("stored", STORED)
def test_answers_are_right_and_pages_are_reused(
    constructed_checkpoint: Path, stored: dict[str, str]
) -> None:
    # chunks end within pages
    with EngineProcess(
        constructed_checkpoint, max_num_batched_tokens=192, environment=stored
    ) as engine:
        assert engine.rpc("m3_index_dtype") == [str(INDEX_KEYS[stored["M3_PLUGIN_INDEX_KEYS"]])]
        require_right_answers_and_reused_pages(engine)


@pytest.mark.extended
@pytest.mark.parametrize("stored", STORED)
def test_drafts_are_verified_on_them(tmp_path: Path, stored: dict[str, str]) -> None:
    """The module's own index keys are stored so as well."""
    with EngineProcess(
        drafting_checkpoint(tmp_path / "checkpoint", wrong_every=2),
        environment=stored,
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        drafts = engine.speculation()
        assert 0 < drafts.accepted < drafts.drafted
