"""The constructed checkpoint through the real engine: the cases of all hosts, and SGLang's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.constructed import PAGE, ConstructedCases, answer, check
from tests.integrations.sglang.engine import EngineProcess


@pytest.fixture(scope="module")
def tight_engine(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Chunks of two pages in steps with decoding rows; little memory.

    There is room for two requests of 1,530 tokens but not for their answers, and SGLang is made to
    admit requests as if they would hardly generate anything.
    """
    with EngineProcess(
        constructed_checkpoint,
        log=tmp_path_factory.mktemp("tight") / "engine.log",
        max_total_tokens=27 * PAGE,
        context_length=4096,
        chunked_prefill_size=256,
        enable_mixed_chunk=True,
        schedule_conservativeness=0.01,
        environment={"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"},
    ) as engine:
        yield engine


class TestConstructed(ConstructedCases):
    """The cases of all hosts."""

    @pytest.fixture(scope="class")
    def engine(self, constructed_engine: EngineProcess) -> EngineProcess:
        return constructed_engine


def test_abort_frees_what_it_held_and_harms_nobody(constructed_engine: EngineProcess) -> None:
    """Two requests decode, one is aborted; its prompt stays in the cache, the rest is free."""
    prompt, beside = (needle_prompt(seed, num_tokens=n) for seed, n in ((630, 3000), (631, 2200)))
    constructed_engine.flush()
    aborted, other = constructed_engine.abort(
        list(prompt.token_ids), after=3, beside=list(beside.token_ids)
    )
    assert aborted.finish_reason == "abort"
    assert 3 <= len(aborted.token_ids) < 1000
    assert tuple(other.token_ids[: len(beside.expected_ids)]) == beside.expected_ids
    assert len(other.token_ids) == 32
    again = answer(constructed_engine, [prompt])
    check([prompt], again)
    assert again[0].num_cached_tokens == 2999 // PAGE * PAGE
    # refused while any request holds pages
    assert constructed_engine.flush()
    fresh = answer(constructed_engine, [prompt])
    check([prompt], fresh)
    assert fresh[0].num_cached_tokens == 0


def test_small_chunks_beside_decoding_requests(tight_engine: EngineProcess) -> None:
    """One step holds rows of a chunk and of a decoding request: 255 new tokens of 256."""
    prompts = [needle_prompt(seed, num_tokens=n) for seed, n in ((600, 1400), (601, 1601))]
    check(prompts, answer(tight_engine, prompts))
    assert "#new-token: 255, #cached-token: 0" in tight_engine.log_text()


def test_retraction(tight_engine: EngineProcess) -> None:
    """Too few pages for all: requests are evicted while they decode, and recomputed."""
    prompts = [needle_prompt(seed, num_tokens=1530) for seed in (610, 611)]
    ids = [list(prompt.token_ids) for prompt in prompts]
    # not `ignore_eos`, for which SGLang reserves all the tokens in advance
    options = {"max_tokens": 150, "min_new_tokens": 150}
    outputs = tight_engine.generate(ids, **options)
    alone = [tight_engine.generate([i], **options)[0] for i in ids]
    assert "Retract requests" in tight_engine.log_text()
    for prompt, output, single in zip(prompts, outputs, alone, strict=True):
        answer_ids = prompt.expected_ids[:-1]
        assert tuple(output.token_ids[: len(answer_ids)]) == answer_ids
        assert output.token_ids == single.token_ids
        assert len(output.token_ids) == 150
