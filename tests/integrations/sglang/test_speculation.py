"""Speculative decoding through the real engine changes nothing but the number of steps.

Greedy outputs are compared token for token with an engine that does not speculate, or with the
constructed checkpoint's known answers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.hub_layout import EOS_TOKEN
from m3_plugin.testing.prompts import (
    NeedlePrompt,
    colour_rgb,
    min_needle_tokens,
    needle_prompt,
    picture_prompt,
)
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from m3_plugin.testing.vocabulary import VOCABULARY
from m3_sglang.compat import speculation_is_tested
from tests.integrations.cases import random_prompt
from tests.integrations.drafts import eagle3_head, separate_mtp
from tests.integrations.draws import chi_square_p, exact_draws
from tests.integrations.sglang import poison
from tests.integrations.sglang.engine import Completion, EngineError, EngineProcess

pytestmark = pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")

PAGE = 128
RETRACTED = "sglang:num_retracted_requests_total"
# Generation passes 127, 128, 129; the budget of 4 blocks; 2047, 2048, 2049.
LENGTHS = (121, 506, 700, 2040)
NUM_TOKENS = 12


def speculation(draft: Path, *, steps: int, algorithm: str = "NEXTN") -> dict[str, Any]:
    """Engine options for chains of `steps` drafts."""
    return {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": steps,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": steps + 1,
        "disable_cuda_graph": True,
    }


def image() -> Any:
    from PIL import Image

    noise = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(3))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def with_image() -> dict[str, Any]:
    """A prompt with an image that passes the budget."""
    text = "the old man ]<]image[>[ and the sea" + " of words" * 300
    return {"prompt": text, "image_data": [image()]}


@pytest.fixture(scope="module")
def random_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with one MTP module; its target is that of `random_engine`."""
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    return write_random_checkpoint(folder, num_mtp_modules=1)


@pytest.fixture(scope="module")
def plain_tokens(random_engine: EngineProcess) -> list[list[int]]:
    """What the random checkpoint generates without speculation."""
    return random_tokens(random_engine)


def random_tokens(engine: EngineProcess) -> list[list[int]]:
    """All prompts together, then the one with the image."""
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    outputs = engine.generate(prompts, **options) + engine.generate([with_image()], **options)
    return [output.token_ids for output in outputs]


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


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.extended), 3])
def test_random_mtp_gives_the_plain_tokens(
    random_mtp: Path, plain_tokens: list[list[int]], tmp_path: Path, steps: int
) -> None:
    """The module out of the target's checkpoint, and out of one of its own."""
    draft = random_mtp if steps == 1 else separate_mtp(random_mtp, tmp_path / "draft")
    with EngineProcess(
        random_mtp, log=tmp_path / "engine.log", **speculation(draft, steps=steps)
    ) as engine:
        require_the_same(engine, plain_tokens)
        assert "drafting for MiniMax-M3 with 1 MSA and 0 dense" in engine.log_text()


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
        **speculation(head, steps=3, algorithm="EAGLE3"),
    ) as engine:
        require_the_same(engine, plain_tokens)


def ids(prompts: Sequence[NeedlePrompt]) -> list[list[int]]:
    return [list(prompt.token_ids) for prompt in prompts]


def cycle(count: int) -> list[int]:
    """What the constructed model says after its answer when told to ignore the end: by design."""
    pair = [VOCABULARY.nowhere_id, VOCABULARY.id_of(EOS_TOKEN)]
    return (pair * count)[:count]


def check(engine: EngineProcess, prompts: Sequence[NeedlePrompt]) -> list[Completion]:
    """Ask all together and compare with the known answers, and 32 tokens after them."""
    outputs = engine.generate(ids(prompts), max_tokens=32, ignore_eos=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = list(prompt.expected_ids)
        assert output.token_ids == answer + cycle(32 - len(answer))
    return outputs


@pytest.fixture(scope="module")
def repeating_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A module that looks up what the target looks up: everything is accepted. Five drafts.

    There is room for three requests of 1,600 tokens but not for their answers, and SGLang is made
    to admit requests as if they would hardly generate anything.
    """
    folder = tmp_path_factory.mktemp("repeating")
    checkpoint = ConstructedCheckpoint(mtp=True).write(folder / "checkpoint", dtype=torch.float32)
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
        answer = list(beside.expected_ids)
        assert other.token_ids == answer + cycle(32 - len(answer))
        check(repeating_engine, [long, beside])

    def test_retraction(self, repeating_engine: EngineProcess) -> None:
        """Too few pages for all: requests are evicted while they speculate, and recomputed."""
        prompts = [needle_prompt(seed, num_tokens=1600) for seed in (610, 611, 612)]
        before = repeating_engine.metric(RETRACTED)
        outputs = repeating_engine.generate(ids(prompts), max_tokens=200, ignore_eos=True)
        assert repeating_engine.metric(RETRACTED) > before
        assert "KV cache pool is full. Retract requests." in repeating_engine.log_text()
        for prompt, output in zip(prompts, outputs, strict=True):
            answer = list(prompt.expected_ids)
            assert output.token_ids == answer + cycle(200 - len(answer))

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
        """The chain's second word names a picture, so the draft for its colour needs the image."""
        from PIL import Image

        colours = ("blue", "yellow")
        pictures = [Image.new("RGB", (112, 112), colour_rgb(colour)) for colour in colours]
        shown = picture_prompt(colours, ask=1).text.rpartition(" question")[0]
        text = f"{shown} note : amber means second . and so on . question : follow amber?"
        (output,) = repeating_engine.generate(
            [{"prompt": text, "image_data": pictures}], max_tokens=4
        )
        assert output.text == " second yellow"
        assert output.num_verify_steps == 1


def from_second_link(prompt: NeedlePrompt) -> NeedlePrompt:
    """The same text, asked for what the answer's first word means."""
    key = next(word for word in VOCABULARY.words if word.id == prompt.expected_ids[0])
    assert key.question_id is not None
    return replace(
        prompt,
        token_ids=(*prompt.token_ids[:-1], key.question_id),
        expected_ids=prompt.expected_ids[1:],
    )


@pytest.fixture(scope="class")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> poison.Poison:
    """What the engine of `erring_engine` is poisoned with."""
    return poison.install(tmp_path_factory.mktemp("poison") / "plugin")


@pytest.fixture(scope="class")
def erring_engine(
    poisoned: poison.Poison, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Every eighth word of a chain is drafted wrong; the module is a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("erring")
    checkpoint = ConstructedCheckpoint(mtp=True, mtp_wrong_every=8).write(
        folder / "checkpoint", dtype=torch.float32
    )
    draft = separate_mtp(checkpoint, folder / "draft")
    with EngineProcess(
        checkpoint,
        log=folder / "engine.log",
        max_running_requests=64,
        chunked_prefill_size=512,
        environment=poisoned.environment(),
        **speculation(draft, steps=3),
    ) as engine:
        yield engine


class TestErringModule:
    """A draft model that is right most of the time: drafts of all lengths are accepted."""

    def test_every_accepted_length_occurs(self, erring_engine: EngineProcess) -> None:
        """Chains of eight phases, so that the mistake falls on each place of a step."""
        whole = [needle_prompt(seed, num_tokens=420, hops=16, decoys=False) for seed in range(4)]
        chains = [chain for prompt in whole for chain in (prompt, from_second_link(prompt))]
        lengths = [0] * 4
        for output in check(erring_engine, chains):
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
            answer = list(prompt.expected_ids)
            assert output.token_ids == answer + cycle(32 - len(answer))
            assert 0 < output.num_accepted < 3 * output.num_verify_steps

    def test_speculation_behind_a_prefix_hit(self, erring_engine: EngineProcess) -> None:
        """The draft model's keys of the prefix are cached with the target's."""
        prompt = needle_prompt(50, num_tokens=1700, hops=6)
        first, second = (check(erring_engine, [prompt])[0] for _ in range(2))
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == 1699 // PAGE * PAGE
        assert second.num_accepted == first.num_accepted > 0

    def test_rejected_slots_are_never_read(
        self, erring_engine: EngineProcess, poisoned: poison.Poison
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
        # nobody may find the poisoned prefix; the last batch leaves a moment after its answers
        assert any(erring_engine.flush() or time.sleep(0.1) for _ in range(100))
        assert all(
            o.token_ids != list(c.expected_ids) for o, c in zip(outputs, chains, strict=True)
        )

    @pytest.mark.extended
    def test_sampling_keeps_the_distribution(self, erring_engine: EngineProcess) -> None:
        """5,000 draws of three words against the exact probabilities of the model without drafts.

        The first word is of the prompt's step, the others come out of verification by sampling.
        """
        length = min_needle_tokens(hops=3, decoys=False)
        prompt = needle_prompt(80, num_tokens=length, hops=3, decoys=False)
        allowed = [*prompt.expected_ids[:3], VOCABULARY.nowhere_id, VOCABULARY.treasures[0].id]
        exact, flatter = (
            exact_draws(
                erring_engine.next_logprobs,
                prompt.token_ids,
                allowed,
                length=3,
                temperature=temperature,
            )
            for temperature in (TEMPERATURE, 1.3 * TEMPERATURE)
        )
        outputs = erring_engine.generate(
            ids([prompt]) * 5000,
            max_tokens=3,
            temperature=TEMPERATURE,
            logit_bias={str(token): 1000.0 for token in allowed},
            ignore_eos=True,
        )
        drawn = Counter(tuple(output.token_ids) for output in outputs)
        assert set(drawn) <= set(exact)
        assert chi_square_p(drawn, exact) > 1e-4
        # a distribution only slightly flatter is told apart
        assert chi_square_p(drawn, flatter) < 1e-6
        steps = Counter(output.num_verify_steps for output in outputs)
        # one step where the first draft was right, two where it was not
        assert min(steps[1], steps[2]) > 500


# of the words' logits, such that no word is certain and none impossible
TEMPERATURE = 25.0


@pytest.mark.extended
def test_a_module_that_is_always_wrong_costs_steps_only(tmp_path: Path) -> None:
    checkpoint = ConstructedCheckpoint(mtp=True, mtp_wrong_every=1).write(
        tmp_path / "checkpoint", dtype=torch.float32
    )
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
