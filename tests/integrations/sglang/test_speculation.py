"""Speculative decoding through the real engine changes nothing but the number of steps.

Greedy outputs are compared token for token with an engine that does not speculate, or with the
constructed checkpoint's known answers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from m3_sglang.compat import speculation_is_tested
from tests.integrations import draws
from tests.integrations.cases import random_prompt
from tests.integrations.drafts import (
    eagle3_head,
    require_the_references_drafts,
    separate_mtp,
)
from tests.integrations.sglang.engine import Completion, EngineError, EngineProcess, speculation
from tests.integrations.sglang.poison import Poison
from tests.integrations.sglang.seen_drafts import SeenDrafts
from tests.integrations.speculation import (
    LENGTHS,
    NUM_TOKENS,
    PAGE,
    PICTURE_ANSWER,
    answer,
    chains_of_eight_phases,
    drafting_checkpoint,
    ids,
    image,
    image_text,
    long_picture_questions,
    picture_question,
    pictures_around_a_chunk_end,
    random_prompts,
    require_transformers_tokens_around_a_chunk_end,
)

pytestmark = pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")

RETRACTED = "sglang:num_retracted_requests_total"


@pytest.fixture(scope="module")
def random_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with two MTP modules; its target is that of `random_engine`."""
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    return write_random_checkpoint(folder, num_mtp_modules=2)


@pytest.fixture(scope="module")
def plain_tokens(random_engine: EngineProcess) -> list[list[int]]:
    """What the random checkpoint generates without speculation."""
    return random_tokens(random_engine)


def with_image(text: str) -> dict[str, Any]:
    return {"prompt": text, "image_data": [image()]}


def random_tokens(engine: EngineProcess) -> list[list[int]]:
    """All prompts together, then the one with the image."""
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    outputs = engine.generate(random_prompts(), **options)
    outputs += engine.generate([with_image(image_text())], **options)
    return [output.token_ids for output in outputs]


def settle(engine: EngineProcess) -> None:
    """Wait for the last round, which ends a moment after its answers, and empty the radix cache."""
    assert any(engine.flush() or time.sleep(0.1) for _ in range(100))


def require_the_same(engine: EngineProcess, plain_tokens: list[list[int]]) -> None:
    """Together; again from the radix cache; and one alone, in which most rows are rejected."""
    assert random_tokens(engine) == plain_tokens
    assert random_tokens(engine) == plain_tokens
    prompt = random_prompt(LENGTHS[-1], seed=LENGTHS[-1])
    (alone,) = engine.generate([prompt], max_tokens=NUM_TOKENS, ignore_eos=True)
    assert alone.token_ids == plain_tokens[len(LENGTHS) - 1]
    assert alone.num_cached_tokens == (LENGTHS[-1] - 1) // PAGE * PAGE
    # no draft of a random module is right but by chance: a step per token
    assert alone.num_verify_steps >= NUM_TOKENS - 2


@pytest.mark.extended
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_random_mtp_gives_the_plain_tokens(
    random_mtp: Path, plain_tokens: list[list[int]], tmp_path: Path, steps: int
) -> None:
    """With the module out of the target's checkpoint."""
    with EngineProcess(
        random_mtp, log=tmp_path / "engine.log", **speculation(random_mtp, steps=steps)
    ) as engine:
        require_the_same(engine, plain_tokens)


@pytest.fixture(scope="class")
def seen(tmp_path_factory: pytest.TempPathFactory) -> SeenDrafts:
    """What the engine of `drafting_at_random` drafts."""
    return SeenDrafts(tmp_path_factory.mktemp("seen") / "plugin")


@pytest.fixture(scope="class")
def drafting_at_random(
    random_mtp: Path, seen: SeenDrafts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Three drafts, of a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("drafting-at-random")
    with EngineProcess(
        random_mtp,
        log=folder / "engine.log",
        environment=seen.install(),
        **speculation(separate_mtp(random_mtp, folder / "draft"), steps=3),
    ) as engine:
        yield engine


class TestRandomModule:
    """No draft is right here but by chance: nearly every verified row but the first is rejected."""

    def test_mtp_gives_the_plain_tokens(
        self, drafting_at_random: EngineProcess, plain_tokens: list[list[int]]
    ) -> None:
        require_the_same(drafting_at_random, plain_tokens)
        log = drafting_at_random.log_text()
        assert "drafting for MiniMax-M3 with 1 MSA and 0 dense" in log

    def test_drafts_equal_the_reference(
        self,
        drafting_at_random: EngineProcess,
        seen: SeenDrafts,
        random_mtp: Path,
        tmp_path: Path,
    ) -> None:
        """Of module 0, although the checkpoint holds two: it is applied again for each draft."""

        def ask(prompt: list[int] | str, max_tokens: int) -> tuple[list[int], list[list[int]]]:
            request = with_image(prompt) if isinstance(prompt, str) else prompt
            settle(drafting_at_random)
            earlier = len(seen.rounds())
            (output,) = drafting_at_random.generate(
                [request], max_tokens=max_tokens, ignore_eos=True
            )
            return output.token_ids, [drafts for (drafts,) in seen.rounds()[earlier:]]

        require_the_references_drafts(random_mtp, ask, scratch=tmp_path / "layer")


@pytest.mark.extended
def test_random_eagle3_gives_the_plain_tokens(
    random_mtp: Path, plain_tokens: list[list[int]], tmp_path: Path
) -> None:
    """A head of one Llama layer in SGLang's own class, on the target's streams."""
    layers = [0, 1, 3]
    head = eagle3_head(random_mtp, tmp_path / "head", aux_layers=tuple(layers))
    config = json.loads((head / "config.json").read_text())
    # the place in which SGLang looks
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": layers}
    (head / "config.json").write_text(json.dumps(config))
    with EngineProcess(
        random_mtp,
        log=tmp_path / "engine.log",
        chunked_prefill_size=512,
        **speculation(head, steps=3, algorithm="EAGLE3"),
    ) as engine:
        require_the_same(engine, plain_tokens)

        def ask(text: str) -> list[int]:
            settle(engine)
            (output,) = engine.generate([with_image(text)], max_tokens=3, ignore_eos=True)
            assert output.num_cached_tokens == 0
            return output.token_ids

        require_transformers_tokens_around_a_chunk_end(random_mtp, ask, end=512)


def check(engine: EngineProcess, prompts: Sequence[NeedlePrompt]) -> list[Completion]:
    """Ask all together and compare with the known answers, and 32 tokens after them."""
    outputs = engine.generate(ids(prompts), max_tokens=32, ignore_eos=True)
    assert [output.token_ids for output in outputs] == [answer(prompt, 32) for prompt in prompts]
    return outputs


@pytest.fixture(scope="module")
def repeating_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A module that looks up what the target looks up: everything is accepted. Five drafts.

    There is room for three requests of 1,600 tokens but not for their answers, and SGLang is made
    to admit requests as if they would hardly generate anything.
    """
    folder = tmp_path_factory.mktemp("repeating")
    checkpoint = drafting_checkpoint(folder / "checkpoint")
    with EngineProcess(
        checkpoint,
        log=folder / "engine.log",
        max_total_tokens=42 * PAGE,
        schedule_conservativeness=0.01,
        environment={"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"},
        enable_metrics=True,
        decode_log_interval=1,
        **speculation(checkpoint, steps=5),
    ) as engine:
        yield engine


class TestRepeatingModule:
    def test_acceptance_is_what_was_designed(self, repeating_engine: EngineProcess) -> None:
        """Six tokens per step: five drafts accepted and the target's own."""
        prompts = [needle_prompt(700 + i, num_tokens=1400 + i, hops=4) for i in range(3)]
        for output in check(repeating_engine, prompts):
            drafted = 5 * output.num_verify_steps
            # the last step may draft past the last token
            assert output.num_accepted >= 0.95 * drafted - 5
            assert output.num_verify_steps <= 7

    @pytest.mark.parametrize("position", [128, 1280, 2048])
    def test_generation_across_a_block_boundary(
        self, repeating_engine: EngineProcess, position: int
    ) -> None:
        """Verified rows of one step lie on both sides of it, at each offset in turn."""
        prompts = [
            needle_prompt(offset, num_tokens=position - 2 - offset, hops=2, decoys=False)
            for offset in range(1, 7)
        ]
        for prompt in prompts:
            check(repeating_engine, [prompt])

    def test_a_prompt_arrives_while_another_one_speculates(
        self, repeating_engine: EngineProcess
    ) -> None:
        """One is aborted in the middle; what it stored harms nobody."""
        long, beside = (needle_prompt(seed, num_tokens=n) for seed, n in ((40, 1500), (41, 3000)))
        aborted, other = repeating_engine.abort(
            list(long.token_ids), after=8, beside=list(beside.token_ids)
        )
        assert aborted.finish_reason == "abort"
        assert other.token_ids == answer(beside, 32)
        check(repeating_engine, [long, beside])

    def test_retraction(self, repeating_engine: EngineProcess) -> None:
        """Too few pages for all: requests are evicted while they speculate, and recomputed."""
        prompts = [needle_prompt(seed, num_tokens=1600) for seed in (610, 611, 612)]
        before = repeating_engine.metric(RETRACTED)
        outputs = repeating_engine.generate(ids(prompts), max_tokens=200, ignore_eos=True)
        assert repeating_engine.metric(RETRACTED) > before
        assert "KV cache pool is full. Retract requests." in repeating_engine.log_text()
        assert [output.token_ids for output in outputs] == [answer(p, 200) for p in prompts]

    def test_retraction_of_pictures(self, repeating_engine: EngineProcess) -> None:
        """Recomputed with their features; answers are those of each alone."""
        requests = [
            {"prompt": text, "image_data": pictures}
            for text, pictures in long_picture_questions(3, num_fillers=1550)
        ]
        options = {"max_tokens": 200, "ignore_eos": True}
        alone = []
        for one in requests:
            settle(repeating_engine)
            alone += repeating_engine.generate([one], **options)
        settle(repeating_engine)
        before = repeating_engine.metric(RETRACTED)
        together = repeating_engine.generate(requests, **options)
        assert repeating_engine.metric(RETRACTED) > before
        assert [output.token_ids for output in together] == [o.token_ids for o in alone]
        assert all(output.text.startswith(PICTURE_ANSWER) for output in alone)

    def test_sglangs_own_metrics_show_the_acceptance(self, repeating_engine: EngineProcess) -> None:
        """The gauges are of the last step, the counter grows by the steps of each answer."""
        before = repeating_engine.metric("sglang:spec_verify_calls_total")
        (output,) = check(repeating_engine, [needle_prompt(730, num_tokens=1400)])
        calls = repeating_engine.metric("sglang:spec_verify_calls_total") - before
        assert calls == output.num_verify_steps > 0
        assert repeating_engine.metric("sglang:spec_accept_rate") == 1
        assert repeating_engine.metric("sglang:spec_accept_length") == 6

    def test_a_picture_is_found_only_with_its_embeddings(
        self, repeating_engine: EngineProcess
    ) -> None:
        text, pictures = picture_question()
        (output,) = repeating_engine.generate(
            [{"prompt": text, "image_data": pictures}], max_tokens=4
        )
        assert output.text == PICTURE_ANSWER
        assert output.num_verify_steps == 1


@pytest.fixture(scope="class")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poison:
    """What the engine of `erring_engine` is poisoned with."""
    return Poison(tmp_path_factory.mktemp("poison") / "plugin")


@pytest.fixture(scope="class")
def erring_engine(
    poisoned: Poison, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Every eighth word of a chain is drafted wrong; the module is a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("erring")
    checkpoint = draws.soften(drafting_checkpoint(folder / "checkpoint", wrong_every=8))
    draft = separate_mtp(checkpoint, folder / "draft")
    with EngineProcess(
        checkpoint,
        log=folder / "engine.log",
        max_running_requests=64,
        chunked_prefill_size=512,
        environment=poisoned.install(),
        **speculation(draft, steps=3),
    ) as engine:
        yield engine


class TestErringModule:
    """A draft model that is right most of the time: drafts of all lengths are accepted."""

    def test_every_accepted_length_occurs(self, erring_engine: EngineProcess) -> None:
        lengths = [0] * 4
        for output in check(erring_engine, chains_of_eight_phases()):
            for accepted, count in enumerate(output.accepted_lengths):
                lengths[accepted] += count
        assert all(lengths), lengths

    def test_a_prompt_arrives_while_another_one_speculates(
        self, erring_engine: EngineProcess
    ) -> None:
        """In six chunks, between two steps of the other; then both speculate.

        SGLang itself never puts rows of a prompt and verified rows into one step.
        """
        first = needle_prompt(40, num_tokens=420, hops=16, decoys=False)
        later = needle_prompt(41, num_tokens=3000)
        outputs = erring_engine.join(list(first.token_ids), list(later.token_ids), after=5)
        for prompt, output in zip((first, later), outputs, strict=True):
            assert output.token_ids == answer(prompt, 32)
            assert 0 < output.num_accepted < 3 * output.num_verify_steps

    def test_a_chunk_ends_before_inside_and_behind_a_picture(
        self, erring_engine: EngineProcess
    ) -> None:
        for text, pictures in pictures_around_a_chunk_end(erring_engine.model, end=512):
            settle(erring_engine)
            (output,) = erring_engine.generate(
                [{"prompt": text, "image_data": pictures}], max_tokens=4
            )
            assert output.text == PICTURE_ANSWER
            assert output.num_cached_tokens == 0

    def test_speculation_behind_a_prefix_hit(self, erring_engine: EngineProcess) -> None:
        """The draft model's keys of the prefix are cached with the target's."""
        prompt = needle_prompt(50, num_tokens=1700, hops=6)
        first, second = (check(erring_engine, [prompt])[0] for _ in range(2))
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == 1699 // PAGE * PAGE
        assert second.num_accepted == first.num_accepted > 0

    def test_rejected_slots_are_never_read(
        self, erring_engine: EngineProcess, poisoned: Poison
    ) -> None:
        """NaN in every uncommitted slot before every step changes nothing; in a committed one, all.

        The second half shows that the first could fail.
        """
        chains = [needle_prompt(seed, num_tokens=420, hops=16, decoys=False) for seed in (70, 71)]
        clean = check(erring_engine, chains)
        poisoned.start()
        outputs = check(erring_engine, chains)
        assert poisoned.stop() > 0
        assert [o.accepted_lengths for o in outputs] == [o.accepted_lengths for o in clean]
        poisoned.start(reach=400)
        outputs = erring_engine.generate(ids(chains), max_tokens=17)
        assert poisoned.stop() > 0
        # nobody may find the poisoned prefix
        settle(erring_engine)
        assert all(
            o.token_ids != list(c.expected_ids) for o, c in zip(outputs, chains, strict=True)
        )

    @pytest.mark.extended
    def test_sampling_keeps_the_distribution(self, erring_engine: EngineProcess) -> None:
        """5,000 draws of three words against the exact distribution without drafts."""
        outputs = erring_engine.generate(
            [draws.PROMPT] * draws.NUM_DRAWS,
            max_tokens=draws.NUM_WORDS,
            temperature=draws.TEMPERATURE,
            logit_bias={str(token): 1000.0 for token in draws.ALLOWED},
            ignore_eos=True,
        )
        draws.require_the_distribution(
            [output.token_ids for output in outputs], erring_engine.next_logprobs
        )
        steps = Counter(output.num_verify_steps for output in outputs)
        # one step where the first draft was right, two where it was not
        assert min(steps[1], steps[2]) > 500


@pytest.mark.extended
def test_a_module_that_is_always_wrong_costs_steps_only(tmp_path: Path) -> None:
    checkpoint = drafting_checkpoint(tmp_path / "checkpoint", wrong_every=1)
    with EngineProcess(
        checkpoint, log=tmp_path / "engine.log", **speculation(checkpoint, steps=2)
    ) as engine:
        prompts = [needle_prompt(800 + i, num_tokens=1400 + i, hops=4) for i in range(3)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        for prompt, output in zip(prompts, outputs, strict=True):
            assert tuple(output.token_ids) == prompt.expected_ids
            assert output.num_accepted == 0


def test_a_checkpoint_without_mtp_weights_is_refused_in_one_sentence(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = random_checkpoint("engine")
    with pytest.raises(EngineError, match=r"holds no MTP weights .* use an EAGLE3 head"):
        EngineProcess(checkpoint, log=tmp_path / "engine.log", **speculation(checkpoint, steps=3))
