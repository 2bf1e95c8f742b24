"""Speculative decoding through the real engine changes nothing but the number of steps.

vLLM picks the number of drafts from the batch size here, so one engine covers several: 5 drafts for
a single request, 3 for two, 2 for three, 1 for more. Greedy outputs are compared token for token
with an engine that does not speculate, or with the constructed checkpoint's known answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from m3_plugin.testing.vocabulary import VOCABULARY
from tests.integrations import draws
from tests.integrations.drafts import (
    eagle3_head,
    require_the_references_drafts,
    separate_mtp,
)
from tests.integrations.speculation import (
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
from tests.integrations.vllm.engine import EngineError, EngineProcess, Speculation

WORKER = "tests.integrations.vllm.speculation_worker.SpeculationWorkerExtension"
DRAFTS = {1: 5, 2: 3, 3: 2, 4: 1}
MTP = {
    "method": "mtp",
    "num_speculative_tokens": 5,
    "num_speculative_tokens_per_batch_size": [[1, 1, 5], [2, 2, 3], [3, 3, 2], [4, 15, 1]],
}


CHUNK = 512


def with_image(text: str) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": image()}}


def random_requests() -> list[Any]:
    """Prompts of several lengths, and one with an image."""
    return [*random_prompts(), with_image(image_text())]


@pytest.fixture(scope="module")
def random_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with one MTP module."""
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    return write_random_checkpoint(folder, num_mtp_modules=1)


@pytest.fixture(scope="module")
def plain_tokens(random_mtp: Path) -> list[list[int]]:
    """What the random checkpoint generates without speculation."""
    with EngineProcess(
        random_mtp, max_num_batched_tokens=CHUNK, limit_mm_per_prompt={"image": 1, "video": 0}
    ) as engine:
        return tokens(engine, random_requests())


def tokens(engine: EngineProcess, requests: Sequence[Any]) -> list[list[int]]:
    outputs = engine.generate(requests, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [output.token_ids for output in outputs]


def check(engine: EngineProcess, prompts: Sequence[NeedlePrompt]) -> Speculation:
    """Ask all together, compare with the known answers; returns what was drafted meanwhile."""
    before = engine.speculation()
    outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
    assert [tuple(output.token_ids) for output in outputs] == [p.expected_ids for p in prompts]
    return engine.speculation().since(before)


@pytest.fixture(scope="class")
def drafting_at_random(random_mtp: Path) -> Iterator[EngineProcess]:
    with EngineProcess(
        random_mtp,
        speculative_config=MTP,
        max_num_batched_tokens=CHUNK,
        limit_mm_per_prompt={"image": 1, "video": 0},
        worker_extension_cls=WORKER,
    ) as engine:
        yield engine


class TestRandomCheckpoint:
    """No draft is right here, whatever drafts: every verified row but the first is rejected."""

    @pytest.mark.parametrize("size", DRAFTS)
    def test_mtp_gives_the_plain_tokens(
        self, drafting_at_random: EngineProcess, plain_tokens: list[list[int]], size: int
    ) -> None:
        """In batches of each size, so with each number of drafts, images among them."""
        requests = random_requests()
        for first in range(0, len(requests), size):
            batch = slice(first, first + size)
            assert tokens(drafting_at_random, requests[batch]) == plain_tokens[batch]

    def test_drafts_equal_the_reference(
        self, drafting_at_random: EngineProcess, random_mtp: Path, tmp_path: Path
    ) -> None:
        """Five drafts a step, of one module applied again and again."""

        def ask(prompt: list[int] | str, max_tokens: int) -> tuple[list[int], list[list[int]]]:
            request = with_image(prompt) if isinstance(prompt, str) else prompt
            earlier = len(drafting_at_random.rpc("recorded_drafts")[0])
            (output,) = drafting_at_random.generate(
                [request], max_tokens=max_tokens, ignore_eos=True
            )
            # a chunk of the prompt drafts too; what it drafts is thrown away
            chunks = -(-(output.num_prompt_tokens - output.num_cached_tokens) // CHUNK)
            rounds = drafting_at_random.rpc("recorded_drafts")[0][earlier + chunks - 1 :]
            return output.token_ids, [drafts for (drafts,) in rounds]

        drafting_at_random.rpc("record_drafts")
        require_the_references_drafts(random_mtp, ask, scratch=tmp_path / "layer")

    def test_eagle3_gives_the_plain_tokens(
        self, random_mtp: Path, plain_tokens: list[list[int]], tmp_path: Path
    ) -> None:
        head = eagle3_head(random_mtp, tmp_path / "head", aux_layers=(1, 2, 4))
        with EngineProcess(
            random_mtp,
            speculative_config={
                "method": "eagle3",
                "model": str(head),
                "num_speculative_tokens": 3,
            },
            max_num_batched_tokens=CHUNK,
            limit_mm_per_prompt={"image": 1, "video": 0},
        ) as engine:
            assert tokens(engine, random_requests()) == plain_tokens
            assert engine.speculation().drafts > len(plain_tokens) * NUM_TOKENS / 4

            def ask(text: str) -> list[int]:
                assert engine.flush()
                return engine.generate([with_image(text)], max_tokens=3, ignore_eos=True)[
                    0
                ].token_ids

            require_transformers_tokens_around_a_chunk_end(random_mtp, ask, end=CHUNK)


def delayed(prompt: NeedlePrompt, count: int) -> list[int]:
    """The prompt with `count` fillers before its question; most of it stays a cached prefix."""
    filler = VOCABULARY.id_of(VOCABULARY.fillers[0])
    return [*prompt.token_ids[:-4], *[filler] * count, *prompt.token_ids[-4:]]


@pytest.fixture(scope="class")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(
        drafting_checkpoint(tmp_path_factory.mktemp("constructed") / "right"),
        speculative_config=MTP,
        max_model_len=2304,
        max_num_batched_tokens=2048,
        # too few for three long requests: some are evicted while they decode
        num_gpu_blocks_override=42,
        limit_mm_per_prompt={"image": 2, "video": 0},
    ) as engine:
        yield engine


class TestRepeatingModule:
    """The module that looks up what the target looks up: everything is accepted."""

    @pytest.mark.parametrize("size", DRAFTS)
    def test_acceptance_is_one(self, repeating: EngineProcess, size: int) -> None:
        prompts = [
            needle_prompt(700 + i, num_tokens=1250 + i, hops=4, decoys=False) for i in range(size)
        ]
        counted = check(repeating, prompts)
        assert counted.drafts > 0
        # a draft may end past the answer's last token; those are not counted as accepted
        assert counted.accepted >= 0.95 * counted.drafted

    def test_a_chain_with_decoys_needs_the_drafts_selection(self, repeating: EngineProcess) -> None:
        """Dense or wrongly selected drafts would follow the decoys and be rejected."""
        counted = check(repeating, [needle_prompt(31, num_tokens=2000, hops=6)])
        assert counted.accepted == counted.drafted > 0

    @pytest.mark.parametrize("position", [128, 512, 2048])
    def test_generation_across_a_block_boundary(
        self, repeating: EngineProcess, position: int
    ) -> None:
        """Of the six rows of a step, 1 to 6 lie behind it."""
        prompt = needle_prompt(1, num_tokens=position - 9, hops=2, decoys=False)
        for delay in range(1, 7):
            before = repeating.speculation()
            (output,) = repeating.generate([delayed(prompt, delay)], max_tokens=12, ignore_eos=True)
            counted = repeating.speculation().since(before)
            assert output.token_ids == answer(prompt, 12)
            assert counted.lengths[5] == counted.drafts == 2

    def test_preemption(self, repeating: EngineProcess) -> None:
        prompts = [needle_prompt(seed, num_tokens=1600) for seed in (610, 611, 612)]
        before = repeating.metric("vllm:num_preemptions")
        outputs = repeating.generate(ids(prompts), max_tokens=200, ignore_eos=True)
        assert repeating.metric("vllm:num_preemptions") > before
        assert [output.token_ids for output in outputs] == [answer(p, 200) for p in prompts]

    def test_preemption_of_pictures(self, repeating: EngineProcess) -> None:
        """Recomputed with their features; answers are those of each alone."""
        requests = [
            {"prompt": text, "multi_modal_data": {"image": pictures}}
            for text, pictures in long_picture_questions(3, num_fillers=1550)
        ]
        options = {"max_tokens": 200, "ignore_eos": True}
        alone = []
        for one in requests:
            repeating.flush()
            alone += repeating.generate([one], **options)
        repeating.flush()
        before = repeating.metric("vllm:num_preemptions")
        together = repeating.generate(requests, **options)
        assert repeating.metric("vllm:num_preemptions") > before
        assert [output.token_ids for output in together] == [o.token_ids for o in alone]
        assert all(output.text.startswith(PICTURE_ANSWER) for output in alone)

    def test_a_picture_is_found_only_with_its_embeddings(self, repeating: EngineProcess) -> None:
        text, pictures = picture_question()
        request = {"prompt": text, "multi_modal_data": {"image": pictures}}
        before = repeating.speculation()
        (output,) = repeating.generate([request], max_tokens=4)
        counted = repeating.speculation().since(before)
        assert output.text == PICTURE_ANSWER
        # all five: the colour, the end, and what comes after it
        assert (counted.drafts, counted.accepted) == (1, 5)


@pytest.fixture(scope="class")
def erring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """Every eighth word of a chain is drafted wrong; the module is a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("erring")
    checkpoint = draws.soften(drafting_checkpoint(folder / "checkpoint", wrong_every=8))
    draft = separate_mtp(checkpoint, folder / "draft")
    with EngineProcess(
        checkpoint,
        speculative_config={
            **MTP,
            "model": str(draft),
            "num_speculative_tokens_per_batch_size": [
                *MTP["num_speculative_tokens_per_batch_size"],
                [16, 256, 2],
            ],
        },
        max_num_batched_tokens=CHUNK,
        max_num_seqs=256,
        limit_mm_per_prompt={"image": 2, "video": 0},
        async_scheduling=False,
        max_logprobs=-1,
        worker_extension_cls=WORKER,
    ) as engine:
        yield engine


class TestErringModule:
    """A draft model that is right most of the time: drafts of all lengths are accepted."""

    @pytest.mark.parametrize("size", DRAFTS)
    def test_every_accepted_length_occurs(self, erring: EngineProcess, size: int) -> None:
        chains = chains_of_eight_phases()
        lengths = [0] * 6
        for first in range(0, len(chains), size):
            counted = check(erring, chains[first : first + size])
            lengths = [a + b for a, b in zip(lengths, counted.lengths, strict=True)]
        assert all(lengths[: DRAFTS[size] + 1]), lengths

    def test_one_speculates_while_another_prefills(self, erring: EngineProcess) -> None:
        """Prompts of 1 to 6 chunks: the short ones verify drafts beside the others' chunks."""
        chains = [
            needle_prompt(40 + i, num_tokens=tokens, hops=hops, decoys=False)
            for i, (tokens, hops) in enumerate([(300, 16), (1500, 6), (3000, 4)])
        ]
        erring.rpc("record_rows", True)
        try:
            assert check(erring, chains).accepted > 0
            (steps,) = erring.rpc("recorded_rows")
        finally:
            erring.rpc("record_rows", False)
        # drafts are verified in at most 1 + 5 rows, chunks end at pages
        mixed = [rows for rows in steps if min(rows) in range(2, 7) and max(rows) >= PAGE]
        assert mixed, steps

    def test_a_chunk_ends_before_inside_and_behind_a_picture(self, erring: EngineProcess) -> None:
        for text, pictures in pictures_around_a_chunk_end(erring.model, end=CHUNK):
            assert erring.flush()
            request = {"prompt": text, "multi_modal_data": {"image": pictures}}
            (output,) = erring.generate([request], max_tokens=4)
            assert output.text == PICTURE_ANSWER
            assert output.num_cached_tokens == 0

    def test_speculation_behind_a_prefix_hit(self, erring: EngineProcess) -> None:
        """vLLM gives the last block of a hit up when it drafts, to have the draft's state."""
        prompt = needle_prompt(50, num_tokens=1700, hops=6)
        first, second = (erring.generate(ids([prompt]), max_tokens=9)[0] for _ in range(2))
        assert tuple(first.token_ids) == tuple(second.token_ids) == prompt.expected_ids
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == (1699 // PAGE - 1) * PAGE

    def test_abort_leaves_the_others_right(self, erring: EngineProcess) -> None:
        chains = [needle_prompt(60 + i, num_tokens=600, hops=16, decoys=False) for i in range(2)]
        other = needle_prompt(65, num_tokens=1700, hops=6)
        produced, beside = erring.abort_midway(ids(chains), steps=4, max_tokens=16, beside=other)
        assert sum(produced) > 0
        assert tuple(beside.token_ids) == other.expected_ids
        check(erring, [other, *chains])

    def test_rejected_slots_are_never_read(self, erring: EngineProcess) -> None:
        """NaN in every uncommitted slot before every step changes nothing; in a committed one, all.

        The second half shows that the first could fail.
        """
        chains = [needle_prompt(seed, num_tokens=420, hops=16, decoys=False) for seed in (70, 71)]
        erring.rpc("poison_uncommitted", True)
        try:
            counted = check(erring, chains)
            assert counted.accepted < counted.drafted
            assert erring.rpc("poisoned")[0] > 0
        finally:
            erring.rpc("poison_uncommitted", False)
        erring.rpc("poison_uncommitted", True, 400)
        try:
            outputs = erring.generate(ids(chains), max_tokens=17)
            assert all(
                o.token_ids != list(c.expected_ids) for o, c in zip(outputs, chains, strict=True)
            )
        finally:
            erring.rpc("poison_uncommitted", False)

    @pytest.mark.extended
    def test_sampling_keeps_the_distribution(self, erring: EngineProcess) -> None:
        """5,000 draws of three words against the exact probabilities of the model without drafts.

        vLLM's own CPU build fails this (`m3_vllm.cpu_repairs`).
        """
        before = erring.speculation()
        outputs = erring.generate(
            [draws.PROMPT] * draws.NUM_DRAWS,
            max_tokens=draws.NUM_WORDS,
            temperature=draws.TEMPERATURE,
            allowed_token_ids=draws.ALLOWED,
            ignore_eos=True,
        )
        counted = erring.speculation().since(before)
        draws.require_the_distribution(
            [output.token_ids for output in outputs], erring.next_logprobs
        )
        # two drafts each: of many none was right, of many the first
        assert min(counted.lengths[:2]) > 500


@pytest.mark.extended
def test_an_always_wrong_module_costs_steps_only(tmp_path: Path) -> None:
    """Served as the text model alone: vLLM finds the same draft class for both architectures."""
    with EngineProcess(
        drafting_checkpoint(tmp_path / "checkpoint", wrong_every=1),
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
        hf_overrides={"architectures": ["MiniMaxM3SparseForCausalLM"]},
        max_num_batched_tokens=2048,
    ) as engine:
        assert engine.model_class() == "m3_vllm.model.M3ForCausalLM"
        counted = check(engine, [needle_prompt(seed, num_tokens=1500) for seed in (90, 91)])
    assert counted.accepted == 0
    assert counted.drafts >= 8


def test_ngram_repeats_what_the_context_repeats(constructed_checkpoint: Path) -> None:
    """One prompt begins with its answer, the other with the answer backwards: right and wrong."""
    prompts = [needle_prompt(seed, num_tokens=900, hops=8, decoys=False) for seed in (95, 96)]
    answers = [list(prompts[0].expected_ids[:-1]), list(prompts[1].expected_ids[-2::-1])]
    requests = [
        [*answer, *prompt.token_ids] for answer, prompt in zip(answers, prompts, strict=True)
    ]
    with EngineProcess(
        constructed_checkpoint,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        max_num_batched_tokens=CHUNK,
    ) as engine:
        outputs = engine.generate(requests, max_tokens=9)
        counted = engine.speculation()
    assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
    assert 0 < counted.accepted < counted.drafted


@pytest.mark.extended
def test_a_checkpoint_without_mtp_weights_stops_the_start(constructed_checkpoint: Path) -> None:
    with pytest.raises(
        EngineError, match=r"holds no MTP weights .*cannot draft with MTP: use an EAGLE3 head"
    ):
        EngineProcess(
            constructed_checkpoint,
            speculative_config={"method": "mtp", "num_speculative_tokens": 3},
        )
