"""HiCache: evicted pages come back from the second pool with their index keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_sglang.compat import fleets_are_tested
from tests.integrations.sglang.engine import Completion, EngineProcess
from tests.integrations.sglang.forgetful import Forgetful

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(not fleets_are_tested(), reason="refused on this SGLang"),
]


def ask(engine: EngineProcess, prompt: NeedlePrompt) -> Completion:
    (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
    return answer


def test_pages_come_back_with_their_index_keys(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    """The first pool holds one prompt at a time, so that each is evicted by the next."""
    forgetful = Forgetful(tmp_path / "plugin")
    prompts = [needle_prompt(seed, num_tokens=n) for seed, n in ((71, 2900), (72, 3100))]
    with EngineProcess(
        constructed_checkpoint,
        log=tmp_path / "engine.log",
        chunked_prefill_size=1024,
        context_length=3584,
        max_total_tokens=3584,
        enable_hierarchical_cache=True,
        hicache_ratio=4,
        environment=forgetful.install(),
    ) as engine:
        for prompt in prompts:
            answer = ask(engine, prompt)
            assert tuple(answer.token_ids) == prompt.expected_ids
            assert answer.num_cached_tokens < 128
        for prompt in prompts:
            answer = ask(engine, prompt)
            assert tuple(answer.token_ids) == prompt.expected_ids
            assert answer.num_cached_tokens > 2560
        forgetful.start()
        answer = ask(engine, prompts[0])
        assert forgetful.stop() > 0
        assert answer.num_cached_tokens > 2560
        assert tuple(answer.token_ids) != prompts[0].expected_ids
