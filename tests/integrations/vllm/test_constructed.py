"""The constructed checkpoint through the real engine: every bug of paging, selection, prefix reuse,
batching or scheduling is a wrong word here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from m3_plugin.testing.prompts import (
    NeedlePrompt,
    PicturePrompt,
    colour_rgb,
    needle_prompt,
    picture_prompt,
)
from m3_plugin.testing.vocabulary import VOCABULARY
from tests.integrations.vllm.engine import Completion, EngineProcess

PAGE = 128


@pytest.fixture(scope="module")
def engine(constructed_checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(
        constructed_checkpoint,
        max_model_len=40960,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=512 << 20,
        limit_mm_per_prompt={"image": 4, "video": 2},
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
    "num_tokens", [1400, 8192, pytest.param(32768, marks=pytest.mark.extended)]
)
def test_chain_with_decoys(engine: EngineProcess, num_tokens: int) -> None:
    prompt = needle_prompt(num_tokens, num_tokens=num_tokens)
    completions = answer(engine, [prompt])
    check([prompt], completions)
    assert prompt.dense_answer not in (None, completions[0].text)


def test_blocks_read_stay_within_the_budget(engine: EngineProcess) -> None:
    """Top-4 of 128-token blocks: a decode row reads 4 blocks per layer and group, never more."""
    prompt = needle_prompt(77, num_tokens=8192)
    engine.rpc("m3_record_statistics", True)
    check([prompt], answer(engine, [prompt]))
    (blocks,) = engine.rpc("m3_statistics")
    engine.rpc("m3_record_statistics", False)
    layers, groups, topk = 2, 4, 4
    decode_steps = prompt.max_tokens - 1
    assert blocks["decode_rows"] == decode_steps * layers
    assert blocks["decode_blocks_read"] == decode_steps * layers * groups * topk
    assert blocks["decode_blocks_visible"] == decode_steps * layers * groups * (8192 // PAGE + 1)


def test_several_chains_at_once(engine: EngineProcess) -> None:
    prompts = [
        needle_prompt(seed, num_tokens=tokens)
        for seed, tokens in enumerate((1400, 1407, 1408, 1409, 2047, 2048, 2049, 5000))
    ]
    check(prompts, answer(engine, prompts))


def test_same_prompt_twice_is_served_from_the_cache(engine: EngineProcess) -> None:
    prompt = needle_prompt(501, num_tokens=3000)
    first, second = (answer(engine, [prompt]) for _ in range(2))
    check([prompt], first)
    check([prompt], second)
    assert first[0].num_cached_tokens == 0
    assert second[0].num_cached_tokens == (3000 - 1) // PAGE * PAGE


def test_shared_prefix_with_different_tails(engine: EngineProcess) -> None:
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


def test_abort_in_the_middle_leaves_others_right(engine: EngineProcess) -> None:
    prompts = [needle_prompt(seed, num_tokens=6000) for seed in (503, 504)]
    ids = [list(prompt.token_ids) for prompt in prompts]
    engine.abort_midway(ids, steps=3, max_tokens=64)
    engine.abort_midway(ids, steps=10, max_tokens=64)
    check(prompts, answer(engine, prompts))


def picture_request(prompt: PicturePrompt) -> dict:
    import numpy as np
    from PIL import Image

    if prompt.modality == "image":
        data: list = [
            Image.new("RGB", (112 + 28 * i, 84), colour_rgb(colour))
            for i, colour in enumerate(prompt.colours)
        ]
    else:
        data = [
            np.full((8, 56, 84, 3), colour_rgb(colour), dtype=np.uint8) for colour in prompt.colours
        ]
    return {"prompt": prompt.text, "multi_modal_data": {prompt.modality: data}}


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("colour", ["red", "cyan", "black"])
def test_colour_of_one_picture(engine: EngineProcess, modality: str, colour: str) -> None:
    prompt = picture_prompt((colour,), modality=modality)
    (output,) = engine.generate([picture_request(prompt)], max_tokens=prompt.max_tokens)
    assert tuple(output.token_ids) == prompt.expected_ids


@pytest.mark.parametrize("ask", [0, 1, 2])
def test_one_of_several_pictures(engine: EngineProcess, ask: int) -> None:
    prompt = picture_prompt(("green", "magenta", "yellow"), ask=ask)
    (output,) = engine.generate([picture_request(prompt)], max_tokens=prompt.max_tokens)
    assert tuple(output.token_ids) == prompt.expected_ids


def test_picture_beyond_the_block_budget(engine: EngineProcess) -> None:
    prompt = picture_prompt(("blue",), num_filler_tokens=1500)
    (output,) = engine.generate([picture_request(prompt)], max_tokens=prompt.max_tokens)
    assert tuple(output.token_ids) == prompt.expected_ids


MIXED = [(600, 1400), (601, 1500), (602, 2300), (603, 4000)]


@pytest.mark.extended
@pytest.mark.parametrize("chunk", [128, 192])
def test_chunk_sizes(constructed_checkpoint: Path, chunk: int) -> None:
    """Chunks that end inside and at block boundaries, mixed with decoding requests."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in MIXED]
    with EngineProcess(constructed_checkpoint, max_num_batched_tokens=chunk) as engine:
        check(prompts, answer(engine, prompts))


def test_preemption(constructed_checkpoint: Path) -> None:
    """Too few pages for all: requests are evicted while they decode, and recomputed."""
    prompts = [needle_prompt(seed, num_tokens=1530) for seed in (610, 611, 612)]
    ids = [list(prompt.token_ids) for prompt in prompts]
    with EngineProcess(
        constructed_checkpoint,
        num_gpu_blocks_override=38,
        max_model_len=2048,
        max_num_batched_tokens=2048,
    ) as engine:
        outputs = engine.generate(ids, max_tokens=150, ignore_eos=True)
        alone = [engine.generate([i], max_tokens=150, ignore_eos=True)[0] for i in ids]
        assert engine.metric("vllm:num_preemptions") > 0
    for prompt, output, single in zip(prompts, outputs, alone, strict=True):
        assert tuple(output.token_ids[: prompt.max_tokens]) == prompt.expected_ids
        assert output.token_ids == single.token_ids


def test_tensor_parallel(constructed_checkpoint: Path) -> None:
    """Two ranks hold two KV heads and index heads each, and one copy of the index keys."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in MIXED]
    with EngineProcess(
        constructed_checkpoint,
        tensor_parallel_size=2,
        max_num_batched_tokens=2048,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as engine:
        check(prompts, answer(engine, prompts))
        assert len(engine.rpc("m3_model_class")) == 2


@pytest.mark.extended
def test_torch_compile(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """The attention op stays opaque: a compiled model answers the same."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in MIXED]
    with EngineProcess(
        constructed_checkpoint,
        enforce_eager=False,
        max_num_batched_tokens=2048,
        environment={"VLLM_CACHE_ROOT": str(tmp_path)},
    ) as engine:
        check(prompts, answer(engine, prompts))


@pytest.mark.extended  # the demo serves in bf16 as well
def test_bf16(constructed_checkpoint: Path) -> None:
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in MIXED]
    with EngineProcess(
        constructed_checkpoint, dtype="bfloat16", max_num_batched_tokens=2048
    ) as engine:
        check(prompts, answer(engine, prompts))
