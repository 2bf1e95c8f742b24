"""Random checkpoints against transformers in fp32: the cases of all hosts, and vLLM's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import golden
from tests.integrations.cases import random_prompt
from tests.integrations.mixed_media import MixedMediaCases, MixedPrompt
from tests.integrations.parity import ParityCases, require_close
from tests.integrations.vllm.engine import EngineProcess


@pytest.fixture(scope="module")
def engine(random_checkpoint: Callable[[str], Path]) -> Iterator[EngineProcess]:
    with EngineProcess(
        random_checkpoint("engine"),
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": 2, "video": 2},
        skip_mm_profiling=True,
    ) as engine:
        yield engine


class TestParity(ParityCases, MixedMediaCases):
    """The cases of all hosts."""

    def dense_rows(self, engine: EngineProcess) -> int:
        (served,) = engine.rpc("m3_dense_rows")
        (rows,) = served.values()
        return rows

    def start(self, checkpoint: Path, folder: Path, **options: Any) -> EngineProcess:
        return EngineProcess(checkpoint, max_num_batched_tokens=2048, **options)

    def media_logprobs(self, engine: EngineProcess, prompt: MixedPrompt) -> tuple[int, list[float]]:
        media = {"image": prompt.images, "video": prompt.videos}
        found = engine.prompt_logprobs({"prompt": prompt.text, "multi_modal_data": media})
        return len(found) + 1, found


def test_our_class_serves_the_model(engine: EngineProcess) -> None:
    assert engine.model_class() == "m3_vllm.model.M3ForConditionalGeneration"


def test_published_block_budget(random_checkpoint: Callable[[str], Path]) -> None:
    """Top-16 of 128-token blocks, 16/4 heads: the budget of 2,048 tokens is really crossed.

    With the vision tower left out, as an operator of text alone asks for.
    """
    checkpoint = random_checkpoint("kernel")
    prompt = random_prompt(2500, seed=5)
    expected = golden.token_logprobs(checkpoint, prompt)
    with EngineProcess(checkpoint, max_num_batched_tokens=1000, language_model_only=True) as engine:
        assert engine.model_class() == "m3_vllm.model.M3ForConditionalGeneration"
        ours = engine.prompt_logprobs(prompt)
    require_close(ours, expected)


def test_image_tokens_equal_transformers(
    engine: EngineProcess, random_checkpoint: Callable[[str], Path]
) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    checkpoint = random_checkpoint("engine")
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
