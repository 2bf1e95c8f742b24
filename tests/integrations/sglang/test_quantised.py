"""Quantised checkpoints in SGLang, dequantised while loaded: the exact path of any chip."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.quantised import DEQUANTISE, QuantisedCheckpoints
from tests.integrations.sglang.engine import EngineDiedError, EngineProcess


def test_logprobs_are_those_of_the_dequantised_weights(
    random_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    """The reference is transformers on numbers noted before they were packed."""
    prompt = random_prompt(1300, seed=11)
    log = tmp_path / "engine.log"
    with EngineProcess(random_quantised.stored("nvfp4"), log=log, environment=DEQUANTISE) as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
        said = engine.log_text()
    expected = golden.token_logprobs(random_quantised.reference("nvfp4"), prompt)
    torch.testing.assert_close(ours, expected, atol=LOGPROB_ATOL, rtol=0)
    plain = golden.token_logprobs(random_quantised.source, prompt)
    assert (expected - plain).abs().max() > 100 * LOGPROB_ATOL
    assert "dequantised to" in said


@pytest.mark.xfail(
    raises=EngineDiedError,
    reason="SGLang 0.5.23 gives an mxfp8 M3 FlashInfer's experts, whose package a CPU lacks",
)
def test_the_constructed_checkpoint_answers_right(
    constructed_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    """8K tokens with decoys: quantised index projections still choose the right blocks."""
    prompt = needle_prompt(8192, num_tokens=8192)
    with EngineProcess(
        constructed_quantised.stored("mxfp8"),
        log=tmp_path / "engine.log",
        environment=DEQUANTISE,
        context_length=16384,
        chunked_prefill_size=8192,
    ) as engine:
        (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
    assert tuple(answer.token_ids) == prompt.expected_ids
    assert prompt.dense_answer not in (None, answer.text)


def test_an_absent_scale_stops_the_start_before_the_model_is_built(
    random_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(random_quantised.stored("mxfp8"), broken)
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        name = "language_model.model.layers.2.self_attn.index_q_proj.weight_scale_inv"
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    log = tmp_path / "engine.log"
    with pytest.raises(EngineDiedError, match=r"lacks .*index_q_proj\.weight_scale_inv"):
        EngineProcess(broken, log=log, environment=DEQUANTISE)


@pytest.fixture
def hooked() -> Callable[[list[str]], object]:
    from m3_sglang.registration import without_quantization

    class Config:
        def __init__(self, architectures: list[str]) -> None:
            self.architectures = architectures

    class ModelConfig:
        def __init__(self, architectures: list[str]) -> None:
            self.hf_config = Config(architectures)
            self.quantization: str | None = "SGLang's default for M3"

    def settle(config: ModelConfig) -> None:
        config.quantization = "its own"

    def settled(architectures: list[str]) -> str | None:
        config = ModelConfig(architectures)
        without_quantization(settle, config)
        return config.quantization

    return settled


def test_other_models_keep_their_quantisation(hooked: Callable[[list[str]], object]) -> None:
    assert hooked(["MiniMaxM3SparseForConditionalGeneration"]) is None
    assert hooked(["MiniMaxM3SparseForCausalLM"]) is None
    assert hooked(["DeepseekV3ForCausalLM"]) == "its own"
