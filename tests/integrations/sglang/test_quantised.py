"""Quantised checkpoints in SGLang, dequantised while loaded: the exact path of any chip."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3_plugin.model.experts import expert_output
from m3_plugin.quantization.chips import LEAST_CAPABILITY, WEIGHT_ONLY_MXFP8
from m3_plugin.testing.prompts import needle_prompt
from m3_plugin.testing.quantised import RECIPES, QuantName
from m3_sglang.compat import speculation_is_tested
from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.quantised import CACHE_SCALES, DEQUANTISE, QuantisedCheckpoints
from tests.integrations.sglang.engine import (
    ENVIRONMENT,
    HOST,
    EngineDiedError,
    EngineProcess,
    speculation,
)
from tests.plugin.model.test_config import hub


def test_logprobs_are_those_of_the_dequantised_weights(
    random_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    """The reference is transformers on numbers noted before they were packed.

    Scales of an fp8 cache are no weights: they change nothing in a cache of 16 bits.
    """
    prompt = random_prompt(1300, seed=11)
    log = tmp_path / "engine.log"
    checkpoint = random_quantised.with_cache_scales("nvfp4")
    with EngineProcess(checkpoint, log=log, environment=DEQUANTISE) as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
        said = engine.log_text()
    expected = golden.token_logprobs(random_quantised.reference("nvfp4"), prompt)
    torch.testing.assert_close(ours, expected, atol=LOGPROB_ATOL, rtol=0)
    plain = golden.token_logprobs(random_quantised.source, prompt)
    assert (expected - plain).abs().max() > 100 * LOGPROB_ATOL
    assert "dequantised to" in said
    assert "scales for an fp8 KV cache: 2 layers have them" in said
    # the dense layer is SGLang's own, and unquantised
    assert "the scales of 1 layers for an fp8 KV cache, such as those of model.layers.0" in said


@pytest.mark.extended
def test_the_constructed_checkpoint_answers_right(
    constructed_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    """8K tokens with decoys: quantised index projections still choose the right blocks.

    The weights stay in 8 bits: without any option of ours, where SGLang itself refuses the format.
    """
    prompt = needle_prompt(8192, num_tokens=8192)
    checkpoint = constructed_quantised.stored("mxfp8")
    log = tmp_path / "engine.log"
    with EngineProcess(
        checkpoint, log=log, context_length=16384, chunked_prefill_size=8192
    ) as engine:
        (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
        # prompt tokens to beyond the dense context: as from the dequantised weights
        beginning = list(prompt.token_ids[:1300])
        reached = torch.tensor(engine.prompt_logprobs(beginning))
        said = engine.log_text()
    assert tuple(answer.token_ids) == prompt.expected_ids
    assert prompt.dense_answer not in (None, answer.text)
    reference = constructed_quantised.reference("mxfp8")
    expected = golden.token_logprobs(reference, beginning)
    rounding = head_rounding(reference, beginning)
    torch.testing.assert_close(reached, expected, atol=rounding, rtol=0)
    plain = golden.token_logprobs(constructed_quantised.source, beginning)
    assert (expected - plain).abs().max() > 100 * rounding
    assert "dequantised" not in said


def head_rounding(checkpoint: Path, token_ids: list[int]) -> float:
    """How far two fp32 log probabilities may lie apart that differ in the order of sums.

    Each is a difference of two logits, and a logit a sum of `hidden` products, whose roundings of
    half a last place of the largest logit (70 here) add up like a random walk: 2e-4.
    """
    model = golden.load(checkpoint)
    with torch.inference_mode():
        largest = float(model(input_ids=torch.tensor([token_ids])).logits.abs().max())
    hidden = model.config.text_config.hidden_size
    return 2 * math.sqrt(hidden) * largest * torch.finfo(torch.float32).eps / 2


@pytest.mark.extended
@pytest.mark.parametrize(
    ("quant", "environment"),
    # columns in another order are not multiplied as stored
    [
        ("gptq", DEQUANTISE),
        *((quant, {}) for quant in RECIPES if quant not in ("mxfp8", "gptq")),
    ],
)
def test_the_constructed_checkpoint_answers_right_in_every_format(
    constructed_quantised: QuantisedCheckpoints,
    tmp_path: Path,
    quant: QuantName,
    environment: dict[str, str],
) -> None:
    """The same for the other formats, as stored or as plain weights."""
    prompt = needle_prompt(8192, num_tokens=8192)
    with EngineProcess(
        constructed_quantised.stored(quant),
        log=tmp_path / "engine.log",
        environment=environment,
        context_length=16384,
    ) as engine:
        (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
        assert ("dequantised to" in engine.log_text()) == (environment == DEQUANTISE)
    assert tuple(answer.token_ids) == prompt.expected_ids
    assert prompt.dense_answer not in (None, answer.text)


@pytest.mark.extended
@pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")
@pytest.mark.parametrize(
    ("quant", "kept", "environment"),
    [("mxfp8", False, {}), ("mxfp8", True, {}), ("nvfp4", False, {})],
)
def test_a_quantised_checkpoint_drafts_for_itself(
    drafting_quantised: QuantisedCheckpoints,
    tmp_path: Path,
    quant: QuantName,
    kept: bool,
    environment: dict[str, str],
) -> None:
    """Decoys beyond the budget; the MTP module quantised as the rest, or the only part that is not.

    The answers are those without speculation, and every draft is right.
    """
    checkpoint = (
        drafting_quantised.with_drafts_kept(quant) if kept else drafting_quantised.stored(quant)
    )
    prompt = needle_prompt(31, num_tokens=2000, hops=6)
    with EngineProcess(
        checkpoint,
        log=tmp_path / "engine.log",
        environment=environment,
        **speculation(checkpoint, steps=3),
    ) as engine:
        (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=32, ignore_eos=True)
    assert tuple(answer.token_ids[: len(prompt.expected_ids)]) == prompt.expected_ids
    assert prompt.dense_answer not in (None, prompt.expected_text)
    # of about 24, the last three may end past the last token
    assert answer.num_accepted >= 3 * answer.num_verify_steps - 3 >= 18


@pytest.mark.extended
def test_an_absent_scale_stops_the_start_before_the_model_is_built(
    random_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    broken, log = random_quantised.without_a_scale("mxfp8"), tmp_path / "engine.log"
    with pytest.raises(
        EngineDiedError, match=r"lacks .*index_q_proj\.weight_scale_inv.* in model-"
    ):
        EngineProcess(broken, log=log, environment=DEQUANTISE)


def test_the_chips_of_each_method_are_those_that_fit_names() -> None:
    """SGLang has names of its own for some methods of a checkpoint."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from m3_sglang.quantization import M3Mxfp8Config

    declared: dict[str, Any] = {
        "mxfp8": Fp8Config(
            is_checkpoint_fp8_serialized=True, weight_block_size=[1, 32], use_mxfp8=True
        ),
        "fp8": Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128]),
        "modelopt": QUANTIZATION_METHODS["modelopt_mixed"],
        "gptq": QUANTIZATION_METHODS["gptq_marlin"],
    }
    for method, least in LEAST_CAPABILITY["SGLang"].items():
        config = declared.get(method) or QUANTIZATION_METHODS[method]
        assert config.get_min_capability() == least, method
    assert M3Mxfp8Config.get_min_capability() == WEIGHT_ONLY_MXFP8


def settled(architecture: str, quantization: str | None, settle: Callable[[Any], None]) -> Any:
    """What becomes of SGLang's choice under our hook around the function that makes it."""
    from m3_sglang.registration import settle_quantization

    values = hub(num_mtp_modules=0) | {"architectures": [architecture]}
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[architecture], to_dict=lambda: values),
        quantization=quantization,
        is_draft_model=False,
    )
    settle_quantization(settle, config)
    return config.quantization


@pytest.mark.parametrize("dequantise", [False, True])
def test_other_models_keep_their_quantisation(
    monkeypatch: pytest.MonkeyPatch, dequantise: bool
) -> None:
    if dequantise:
        monkeypatch.setenv("M3_PLUGIN_DEQUANTIZE", "1")

    def settle(config: Any) -> None:
        config.quantization = "its own"

    for name in ("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3SparseForCausalLM"):
        assert settled(name, "fp8", settle) == (None if dequantise else "its own")
        assert settled(name, "m3_mxfp8", settle) == (None if dequantise else "m3_mxfp8")
    assert settled("DeepseekV3ForCausalLM", "mxfp8", settle) == "its own"


def served(checkpoint: Path, **arguments: Any) -> dict[str, Any]:
    """What our provider says of a checkpoint's weights."""
    from m3_sglang.registration import weight_defaults

    config = json.loads((checkpoint / "config.json").read_text())
    plain = {"device": "cpu", "moe_runner_backend": "auto", "quantization": None}
    hf_config = SimpleNamespace(architectures=config["architectures"], to_dict=lambda: config)
    return weight_defaults(SimpleNamespace(**{**plain, **arguments}), hf_config)


def test_which_checkpoints_stay_in_eight_bits(
    monkeypatch: pytest.MonkeyPatch, random_quantised: QuantisedCheckpoints
) -> None:
    ours = {"quantization": "m3_mxfp8", "moe_runner_backend": "triton"}
    assert served(random_quantised.stored("mxfp8")) == ours
    stored = {"quantization": "m3_stored", "moe_runner_backend": "triton"}
    assert served(random_quantised.stored("nvfp4")) == stored
    assert served(random_quantised.stored("nvfp4"), device="cuda") == {}
    with pytest.raises(ValueError, match="--tokenizer-worker-num must be 1 for quantised weights"):
        served(random_quantised.stored("awq"), tokenizer_worker_num=2)
    assert served(random_quantised.source) == {}
    from sglang.srt import utils

    # the host's own on SM100, on the expert kernel that computes what M3 does
    sm100 = {"moe_runner_backend": "flashinfer_trtllm_routed"}
    for capability, expected in (((8, 0), ours), ((9, 0), ours), ((10, 0), sm100), ((12, 0), ours)):
        monkeypatch.setattr(utils, "is_cuda", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert served(random_quantised.stored("mxfp8"), device="cuda") == expected
    monkeypatch.setenv("M3_PLUGIN_DEQUANTIZE", "1")
    plain = {"quantization": None, "moe_runner_backend": "triton"}
    assert served(random_quantised.stored("mxfp8")) == plain
    chosen = served(random_quantised.stored("nvfp4"), moe_runner_backend="cutlass")
    assert chosen == plain | {"moe_runner_backend": "cutlass"}


def test_sglang_s_loader_leaves_the_checkpoint_s_bytes_in_place(
    random_quantised: QuantisedCheckpoints, tmp_path: Path
) -> None:
    """Every projection and expert as stored, in as many bytes; cache scales where they are used."""
    stored = random_quantised.with_cache_scales("mxfp8")
    module = "tests.integrations.sglang.host_layers"
    facts = HOST.report(module, stored, folder=tmp_path, environment=ENVIRONMENT)
    attention, experts = "model.layers.1.self_attn", "model.layers.1.block_sparse_moe.experts"
    expected = {f"{attention}.qkv_proj", f"{attention}.index_qkv_proj", f"{attention}.o_proj"}
    assert expected | {f"{experts}.w13", f"{experts}.w2"} <= set(facts["layers"])
    assert [name for name, held in facts["layers"].items() if not held] == []
    # beside the weights the files hold four scales of a cache
    assert facts["stored"] - facts["bytes"] == sum(t.nbytes for t in CACHE_SCALES.values())
    assert facts["scales"] == {attention: [[0.5, 1.5, 3.0, 0.25], [2.0, 0.75, 1.0, 4.0]]}


def experts_layer(*, experts: int, hidden: int, inner: int) -> nn.Module:
    """What SGLang's layer of routed experts is to its method."""
    from m3_sglang.quantization import Mxfp8ExpertsMethod

    layer = nn.Module()
    layer.moe_runner_config = SimpleNamespace(gemm1_alpha=1.702, gemm1_clamp_limit=7.0)  # type: ignore[assignment]
    Mxfp8ExpertsMethod().create_weights(
        layer, experts, hidden, inner, torch.float32, weight_loader=None
    )
    random = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        # gates and ups beyond the clamp, of either sign
        drawn = torch.randn(parameter.shape, generator=random) * 2
        scale = torch.randint(124, 128, parameter.shape, generator=random)
        parameter.data.copy_(scale if name.endswith("scale_inv") else drawn)
    return layer


def test_products_in_eight_bits_are_compiled_when_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from m3_sglang import quantization

    asked: list[tuple[Any, ...]] = []

    def compiled(weight: Tensor, scales: Tensor, *, dtype: torch.dtype) -> None:
        asked.append((*weight.shape, *scales.shape, dtype))

    monkeypatch.setattr(quantization, "compile_mxfp8_linear", compiled)
    linear, experts = quantization.Mxfp8LinearMethod(), quantization.Mxfp8ExpertsMethod()
    layers = nn.Module(), nn.Module()
    linear.create_weights(layers[0], 64, [96, 32], 64, 128, torch.bfloat16)
    experts.create_weights(layers[1], 5, 64, 96, torch.float16)
    for method, layer in zip((linear, experts), layers, strict=True):
        method.process_weights_after_loading(layer)
    assert asked == [
        (128, 64, 128, 2, torch.bfloat16),
        (5, 192, 64, 5, 192, 2, torch.float16),
        (5, 64, 96, 5, 64, 3, torch.float16),
    ]


def test_experts_in_eight_bits_are_those_of_the_decoded_weights() -> None:
    """Tokens without an expert (id -1, as padding has), experts without a token, and both signs."""
    from m3_plugin.quantization.codecs import dequantise
    from m3_plugin.quantization.formats import Mxfp8
    from m3_sglang.moe import activations_as_is
    from m3_sglang.quantization import Mxfp8ExpertsMethod

    layer = experts_layer(experts=5, hidden=64, inner=96)
    parameters = dict(layer.named_parameters())
    assert sum(p.nbytes for p in parameters.values()) == 5 * (3 * 96 * 64) * 33 // 32
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 4], [4, 1], [1, 0], [0, 1], [4, 0], [1, 4], [-1, -1]])
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    dispatched = SimpleNamespace(
        hidden_states=x, topk_output=SimpleNamespace(topk_ids=ids, topk_weights=weights)
    )
    with activations_as_is("cpu"):
        out = Mxfp8ExpertsMethod().apply(layer, dispatched).hidden_states

    def decoded(name: str) -> Tensor:
        values, scales = parameters[f"{name}_weight"], parameters[f"{name}_weight_scale_inv"]
        pairs = zip(values, scales, strict=True)
        return torch.stack(
            [dequantise(Mxfp8(), {"weight": v, "weight_scale_inv": s}) for v, s in pairs]
        )

    w13, w2 = decoded("w13"), decoded("w2")
    rules: Any = SimpleNamespace(swiglu_alpha=1.702, swiglu_limit=7.0, swiglu_beta=1.0)
    expected = torch.zeros(7, 64)
    for token in range(6):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            answer = expert_output(x[token, None], w13[expert], w2[expert], rules)
            expected[token] += weight * answer[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-2)
    assert expected.abs().max() > 10


def test_a_rank_with_part_of_a_group_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32 on every rank; got 48: use fewer"):
        experts_layer(experts=1, hidden=64, inner=48)
