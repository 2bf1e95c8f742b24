"""Random checkpoints through the real engine against transformers in fp32: tokens and logprobs.

Prompts reach past the block budget, where a wrong selection shows; below it MSA equals dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, Case, random_prompt, recorded
from tests.integrations.vllm.engine import EngineProcess


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("engine")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(
        checkpoint, max_num_batched_tokens=2048, limit_mm_per_prompt={"image": 2, "video": 1}
    ) as engine:
        yield engine


def test_our_class_serves_the_model(engine: EngineProcess) -> None:
    assert engine.model_class() == "m3_vllm.model.M3ForConditionalGeneration"


@pytest.mark.parametrize("length", [1, 127, 128, 129, 511, 512, 513, 1300])
def test_greedy_tokens_equal_transformers(
    engine: EngineProcess, checkpoint: Path, length: int
) -> None:
    prompt = random_prompt(length, seed=length)
    (ours,) = engine.generate([prompt], max_tokens=12, ignore_eos=True)
    assert ours.token_ids == golden.greedy(checkpoint, prompt, num_tokens=12)


def test_batched_greedy_tokens_equal_transformers(engine: EngineProcess, checkpoint: Path) -> None:
    prompts = [random_prompt(n, seed=100 + n) for n in (3, 200, 700, 1000)]
    limits = [9, 5, 7, 3]
    outputs = engine.generate(prompts, max_tokens=limits, ignore_eos=True)
    for prompt, limit, ours in zip(prompts, limits, outputs, strict=True):
        assert ours.token_ids == golden.greedy(checkpoint, prompt, num_tokens=limit)


def prompt_logprobs(engine: EngineProcess, prompt: list[int]) -> torch.Tensor:
    """vLLM's log probability of every prompt token after the first."""
    return torch.tensor(engine.prompt_logprobs(prompt))


def test_prompt_logprobs_equal_transformers(engine: EngineProcess, checkpoint: Path) -> None:
    prompt = random_prompt(1500, seed=7)
    torch.testing.assert_close(
        prompt_logprobs(engine, prompt),
        golden.token_logprobs(checkpoint, prompt),
        atol=LOGPROB_ATOL,
        rtol=0,
    )


@pytest.mark.parametrize("case", recorded(), ids=lambda case: f"{case['length']} tokens")
def test_the_record_every_host_must_give(engine: EngineProcess, case: Case) -> None:
    prompt = random_prompt(case["length"], seed=case["seed"])
    (ours,) = engine.generate([prompt], max_tokens=len(case["token_ids"]), ignore_eos=True)
    assert ours.token_ids == case["token_ids"]
    torch.testing.assert_close(
        prompt_logprobs(engine, prompt), torch.tensor(case["logprobs"]), atol=LOGPROB_ATOL, rtol=0
    )


def test_published_block_budget(random_checkpoint: Callable[[str], Path]) -> None:
    """Top-16 of 128-token blocks, 16/4 heads: the budget of 2,048 tokens is really crossed."""
    checkpoint = random_checkpoint("kernel")
    prompt = random_prompt(2500, seed=5)
    expected = golden.token_logprobs(checkpoint, prompt)
    with EngineProcess(checkpoint, max_num_batched_tokens=1000) as engine:
        ours = prompt_logprobs(engine, prompt)
    torch.testing.assert_close(ours, expected, atol=LOGPROB_ATOL, rtol=0)


def test_image_tokens_equal_transformers(engine: EngineProcess, checkpoint: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    noise = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(3))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = "the old man ]<]image[>[ and the sea" + " of words" * 400
    inputs = processor(text=text, images=[image], return_tensors="pt")
    token_ids = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask")
    expected = golden.greedy(checkpoint, token_ids, num_tokens=8, **inputs)
    (ours,) = engine.generate(
        [{"prompt": text, "multi_modal_data": {"image": image}}], max_tokens=8, ignore_eos=True
    )
    assert len(token_ids) > 512
    assert ours.token_ids == expected


@pytest.mark.extended
def test_bf16_follows_fp32_teacher_forced(
    random_checkpoint: Callable[[str], Path], checkpoint: Path
) -> None:
    """bf16 flips single router or block choices, so means are compared, not maxima."""
    prompt = random_prompt(1500, seed=9)
    with EngineProcess(checkpoint, dtype="bfloat16", max_num_batched_tokens=2048) as engine:
        ours = prompt_logprobs(engine, prompt)
    difference = (ours - golden.token_logprobs(checkpoint, prompt)).abs()
    assert difference.mean() <= 0.05


@pytest.mark.extended
def test_layers_declared_dense_are_dense(checkpoint: Path, tmp_path: Path) -> None:
    """The reference chooses all 11 blocks instead; index weights of the checkpoint are not read."""
    prompt = random_prompt(1300, seed=11)
    dense = golden.with_sparse_config(checkpoint, tmp_path / "dense", use_sparse_attention=False)
    chosen = golden.with_sparse_config(checkpoint, tmp_path / "all", sparse_topk_blocks=16)
    with EngineProcess(dense) as engine:
        (ours,) = engine.generate([prompt], max_tokens=12, ignore_eos=True)
    expected = golden.greedy(chosen, prompt, num_tokens=12)
    assert ours.token_ids == expected
    assert expected != golden.greedy(checkpoint, prompt, num_tokens=12)
