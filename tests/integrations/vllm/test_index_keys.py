"""Index keys in int8: half the bytes, in pages that vLLM allocates, shares and frees as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.index_keys import INT8, require_right_answers_and_reused_pages
from tests.integrations.speculation import drafting_checkpoint, ids
from tests.integrations.vllm.engine import EngineProcess


def test_answers_are_right_and_pages_are_reused(constructed_checkpoint: Path) -> None:
    # chunks end within pages
    with EngineProcess(
        constructed_checkpoint, max_num_batched_tokens=192, environment=INT8
    ) as engine:
        assert engine.rpc("m3_index_dtype") == ["torch.int8"]
        require_right_answers_and_reused_pages(engine)


@pytest.mark.extended
def test_drafts_are_verified_on_them(tmp_path: Path) -> None:
    """The module's own index keys are in int8 as well."""
    with EngineProcess(
        drafting_checkpoint(tmp_path / "checkpoint", wrong_every=2),
        environment=INT8,
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        drafts = engine.speculation()
        assert 0 < drafts.accepted < drafts.drafted
