"""The constructed checkpoint through the real engine: every bug of paging, selection, prefix reuse,
batching or scheduling is a wrong word here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_plugin.testing.vocabulary import VOCABULARY
from tests.integrations.sglang.engine import Completion, EngineProcess

PAGE = 128


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


def answer(engine: EngineProcess, prompts: list[NeedlePrompt]) -> list[Completion]:
    """Greedy answers to all prompts in one batch."""
    return engine.generate(
        [list(prompt.token_ids) for prompt in prompts],
        max_tokens=[prompt.max_tokens for prompt in prompts],
    )


def check(prompts: list[NeedlePrompt], completions: list[Completion]) -> None:
    """Compare word by word, so that a failure shows which hop went where."""
    expected = [words(prompt.expected_ids) for prompt in prompts]
    assert [words(c.token_ids) for c in completions] == expected


def words(token_ids: tuple[int, ...] | list[int]) -> str:
    return "".join(VOCABULARY.text_of(token) for token in token_ids)


@pytest.mark.parametrize(
    "num_tokens",
    [
        pytest.param(1400, marks=pytest.mark.every_release),
        8192,
        pytest.param(32768, marks=pytest.mark.extended),
    ],
)
def test_chain_with_decoys(constructed_engine: EngineProcess, num_tokens: int) -> None:
    prompt = needle_prompt(num_tokens, num_tokens=num_tokens)
    completions = answer(constructed_engine, [prompt])
    check([prompt], completions)
    assert prompt.dense_answer not in (None, completions[0].text)


def test_several_chains_at_once(constructed_engine: EngineProcess) -> None:
    prompts = [
        needle_prompt(seed, num_tokens=tokens)
        for seed, tokens in enumerate((1400, 1407, 1408, 1409, 2047, 2048, 2049, 5000))
    ]
    check(prompts, answer(constructed_engine, prompts))


@pytest.mark.every_release
def test_same_prompt_twice_is_served_from_the_cache(constructed_engine: EngineProcess) -> None:
    prompt = needle_prompt(501, num_tokens=3000)
    first, second = (answer(constructed_engine, [prompt]) for _ in range(2))
    constructed_engine.flush()
    third = answer(constructed_engine, [prompt])
    for completions in (first, second, third):
        check([prompt], completions)
    assert [c[0].num_cached_tokens for c in (first, second, third)] == [0, 2999 // PAGE * PAGE, 0]


@pytest.mark.parametrize("shared", [0, 1, 127, 128, 129])
def test_prefixes_around_a_page(constructed_engine: EngineProcess, shared: int) -> None:
    """A hit is whole pages: `shared` tokens beyond three pages give three or four of them."""
    prompt = needle_prompt(520, num_tokens=2000)
    length = 3 * PAGE + shared
    constructed_engine.flush()
    constructed_engine.generate([list(prompt.token_ids[:length])], max_tokens=1)
    completions = answer(constructed_engine, [prompt])
    check([prompt], completions)
    assert completions[0].num_cached_tokens == length // PAGE * PAGE


def test_shared_prefix_with_different_tails(constructed_engine: EngineProcess) -> None:
    """The same context asked for each link of its chain; all but the first reuse its pages."""
    prompt = needle_prompt(502, num_tokens=4000)
    tails = []
    for hop in range(1, len(prompt.expected_ids) - 1):
        key = next(w for w in VOCABULARY.words if w.id == prompt.expected_ids[hop - 1])
        assert key.question_id is not None
        tails.append((hop, [*prompt.token_ids[:-1], key.question_id]))
    check([prompt], answer(constructed_engine, [prompt]))
    outputs = constructed_engine.generate([ids for _, ids in tails], max_tokens=prompt.max_tokens)
    for (hop, _), output in zip(tails, outputs, strict=True):
        assert tuple(output.token_ids) == prompt.expected_ids[hop:]
        assert output.num_cached_tokens == 3999 // PAGE * PAGE


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
