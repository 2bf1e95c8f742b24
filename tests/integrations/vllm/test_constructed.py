"""The constructed checkpoint through the real engine: the cases of all hosts, and vLLM's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from m3_plugin.testing.prompts import PicturePrompt, colour_rgb, needle_prompt, picture_prompt
from tests.integrations.constructed import PAGE, ConstructedCases, answer, check
from tests.integrations.vllm.engine import EngineProcess


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


class TestConstructed(ConstructedCases):
    """The cases of all hosts."""


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


def test_abort_in_the_middle_leaves_others_right(engine: EngineProcess) -> None:
    """Once inside a prompt and once when both answer, while another request decodes beside them."""
    prompts = [needle_prompt(seed, num_tokens=6000) for seed in (503, 504)]
    ids = [list(prompt.token_ids) for prompt in prompts]
    for steps, seed in ((3, 505), (8, 506)):
        other = needle_prompt(seed, num_tokens=1400, hops=16, decoys=False)
        produced, completion = engine.abort_midway(ids, steps=steps, max_tokens=64, beside=other)
        assert (min(produced) > 0) == (steps > 3), produced
        check([other], [completion])
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
