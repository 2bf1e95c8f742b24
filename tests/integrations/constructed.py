"""The constructed checkpoint through a real engine: what every host must answer, as one list.

Every bug of paging, selection, prefix reuse, batching or scheduling is a wrong word here. A host's
`test_constructed.py` derives `ConstructedCases` with its engine in the fixture `engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_plugin.testing.vocabulary import VOCABULARY

PAGE = 128


def answer(engine: Any, prompts: Sequence[NeedlePrompt]) -> list[Any]:
    """Greedy answers to all prompts in one batch."""
    return engine.generate(
        [list(prompt.token_ids) for prompt in prompts],
        max_tokens=[prompt.max_tokens for prompt in prompts],
    )


def check(prompts: Sequence[NeedlePrompt], completions: Sequence[Any]) -> None:
    """Compare word by word, so that a failure shows which hop went where."""
    expected = [words(prompt.expected_ids) for prompt in prompts]
    assert [words(completion.token_ids) for completion in completions] == expected


def words(token_ids: Sequence[int]) -> str:
    """The text of an answer."""
    return "".join(VOCABULARY.text_of(token) for token in token_ids)


class ConstructedCases:
    """Chains of retrievals whose answers are known; `engine` has room for 33K tokens."""

    @pytest.mark.parametrize(
        "num_tokens",
        [
            pytest.param(1400, marks=pytest.mark.every_release),
            8192,
            pytest.param(32768, marks=pytest.mark.extended),
        ],
    )
    def test_chain_with_decoys(self, engine: Any, num_tokens: int) -> None:
        prompt = needle_prompt(num_tokens, num_tokens=num_tokens)
        completions = answer(engine, [prompt])
        check([prompt], completions)
        assert prompt.dense_answer not in (None, completions[0].text)

    def test_several_chains_at_once(self, engine: Any) -> None:
        prompts = [
            needle_prompt(seed, num_tokens=tokens)
            for seed, tokens in enumerate((1400, 1407, 1408, 1409, 2047, 2048, 2049, 5000))
        ]
        check(prompts, answer(engine, prompts))

    @pytest.mark.every_release
    def test_same_prompt_twice_is_served_from_the_cache(self, engine: Any) -> None:
        prompt = needle_prompt(501, num_tokens=3000)
        first, second = (answer(engine, [prompt]) for _ in range(2))
        assert engine.flush()
        third = answer(engine, [prompt])
        for completions in (first, second, third):
            check([prompt], completions)
        cached = [c[0].num_cached_tokens for c in (first, second, third)]
        assert cached == [0, 2999 // PAGE * PAGE, 0]

    @pytest.mark.parametrize("shared", [0, 1, 127, 128, 129])
    def test_prefixes_around_a_page(self, engine: Any, shared: int) -> None:
        """A hit is whole pages: `shared` tokens beyond three give three or four of them."""
        prompt = needle_prompt(520, num_tokens=2000)
        length = 3 * PAGE + shared
        assert engine.flush()
        engine.generate([list(prompt.token_ids[:length])], max_tokens=1)
        completions = answer(engine, [prompt])
        check([prompt], completions)
        assert completions[0].num_cached_tokens == length // PAGE * PAGE

    def test_shared_prefix_with_different_tails(self, engine: Any) -> None:
        """The same context asked for each link of its chain; all but the first reuse its pages."""
        prompt = needle_prompt(502, num_tokens=4000)
        tails = []
        for hop in range(1, len(prompt.expected_ids) - 1):
            key = next(w for w in VOCABULARY.words if w.id == prompt.expected_ids[hop - 1])
            assert key.question_id is not None
            tails.append((hop, [*prompt.token_ids[:-1], key.question_id]))
        check([prompt], answer(engine, [prompt]))
        outputs = engine.generate([ids for _, ids in tails], max_tokens=prompt.max_tokens)
        for (hop, _), output in zip(tails, outputs, strict=True):
            assert tuple(output.token_ids) == prompt.expected_ids[hop:]
            assert output.num_cached_tokens == 3999 // PAGE * PAGE
