"""Quantised checkpoints in vLLM: dequantised while loaded, and loaded into vLLM's own layers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import quantization

from m3_plugin.quantization.chips import LEAST_CAPABILITY
from m3_plugin.testing.prompts import needle_prompt
from m3_plugin.testing.quantised import RECIPES, QuantName
from m3_vllm.quantization import PlainWeights, StoredWeights
from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.quantised import DEQUANTISE, QuantisedCheckpoints
from tests.integrations.vllm.engine import HOST, EngineError, EngineProcess


def test_logprobs_are_those_of_the_dequantised_weights(
    random_quantised: QuantisedCheckpoints,
) -> None:
    """The reference is transformers on numbers noted before they were packed.

    Reordered GPTQ is a format which vLLM itself refuses. Scales of an fp8 cache are no weights:
    they change nothing in a cache of wider numbers.
    """
    prompt = random_prompt(1300, seed=11)
    with EngineProcess(
        random_quantised.with_cache_scales("gptq"),
        environment=DEQUANTISE,
        max_num_batched_tokens=2048,
    ) as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
    expected = golden.token_logprobs(random_quantised.reference("gptq"), prompt)
    torch.testing.assert_close(ours, expected, atol=LOGPROB_ATOL, rtol=0)
    plain = golden.token_logprobs(random_quantised.source, prompt)
    assert (expected - plain).abs().max() > 100 * LOGPROB_ATOL


@pytest.mark.extended
@pytest.mark.parametrize(
    ("quant", "environment"),
    # columns in another order are not multiplied as stored
    [("gptq", DEQUANTISE), *((quant, {}) for quant in RECIPES if quant != "gptq")],
)
def test_the_constructed_checkpoint_answers_right(
    constructed_quantised: QuantisedCheckpoints, quant: QuantName, environment: dict[str, str]
) -> None:
    """8K tokens with decoys: the right blocks are chosen, whatever the weights were rounded to."""
    prompt = needle_prompt(8192, num_tokens=8192)
    with EngineProcess(
        constructed_quantised.stored(quant),
        environment=environment,
        max_model_len=16384,
        max_num_batched_tokens=2048,
    ) as engine:
        (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
    assert tuple(answer.token_ids) == prompt.expected_ids
    assert prompt.dense_answer not in (None, answer.text)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("quant", "kept", "environment"), [("gptq", False, DEQUANTISE), ("awq", True, {})]
)
def test_a_quantised_checkpoint_drafts_for_itself(
    drafting_quantised: QuantisedCheckpoints,
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
        environment=environment,
        max_num_batched_tokens=2048,
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    ) as engine:
        (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=32, ignore_eos=True)
        counted = engine.speculation()
    assert tuple(answer.token_ids[: len(prompt.expected_ids)]) == prompt.expected_ids
    assert prompt.dense_answer not in (None, prompt.expected_text)
    # of about 24, the last three may end past the last token
    assert counted.accepted >= counted.drafted - 3 >= 18


@pytest.mark.extended
def test_an_absent_scale_stops_the_start_before_the_model_is_built(
    random_quantised: QuantisedCheckpoints,
) -> None:
    broken = random_quantised.without_a_scale("mxfp8")
    with pytest.raises(EngineError, match=r"lacks .*index_q_proj\.weight_scale_inv.* in model-"):
        EngineProcess(broken, environment=DEQUANTISE)


def test_logprobs_of_weights_in_their_stored_bytes(random_quantised: QuantisedCheckpoints) -> None:
    """NVFP4 experts, MXFP8 projections and a plain index branch, without an option of ours."""
    prompt = random_prompt(1300, seed=12)
    with EngineProcess(random_quantised.stored("nvfp4"), max_num_batched_tokens=512) as engine:
        ours = torch.tensor(engine.prompt_logprobs(prompt))
    expected = golden.token_logprobs(random_quantised.reference("nvfp4"), prompt)
    torch.testing.assert_close(ours, expected, atol=LOGPROB_ATOL, rtol=0)


@pytest.mark.parametrize("quant", ["awq", pytest.param("fp8", marks=pytest.mark.extended)])
def test_layers_on_a_cpu_hold_what_the_checkpoint_stores_in_as_many_bytes(
    random_quantised: QuantisedCheckpoints, tmp_path: Path, quant: str
) -> None:
    """Every projection and expert decoded from the parameters that vLLM's loaders filled."""
    stored = random_quantised.stored(quant)  # type: ignore[arg-type]
    reference = random_quantised.reference(quant)  # type: ignore[arg-type]
    module = "tests.integrations.vllm.stored_layers"
    found: dict[str, Any] = HOST.report(module, stored, reference, folder=tmp_path)
    attention = "model.layers.1.self_attn"
    expected = {f"{attention}.qkv_proj", f"{attention}.o_proj", "model.layers.0.mlp.down_proj"}
    assert expected | {"model.layers.1.block_sparse_moe.experts"} <= found["layers"].keys()
    assert {entry["kind"] for entry in found["layers"].values()} == {
        "int4" if quant == "awq" else "fp8"
    }
    assert {name: entry for name, entry in found["layers"].items() if entry["difference"]} == {}
    assert found["bytes"] <= 1.15 * found["files"]


@pytest.mark.parametrize("quant", ["mxfp8", pytest.param("nvfp4", marks=pytest.mark.extended)])
def test_vllm_s_own_layers_hold_what_the_checkpoint_stores(
    random_quantised: QuantisedCheckpoints, tmp_path: Path, quant: str
) -> None:
    """Every projection, expert and scale in its place, compared through the codecs.

    Scales of an fp8 cache are in the layer that multiplies with them, vLLM's own or ours.

    vLLM has no kernel for these formats on CPU, so only its choice of one is left out.
    """
    stored = random_quantised.with_cache_scales(quant)  # type: ignore[arg-type]
    reference = random_quantised.reference(quant)  # type: ignore[arg-type]
    module = "tests.integrations.vllm.host_layers"
    compared: dict[str, Any] = HOST.report(module, stored, reference, folder=tmp_path)
    layers = {name: entry.get("format") for name, entry in compared.items()}
    attention = "model.layers.1.self_attn"
    if quant == "mxfp8":
        # all of it in one layer, because all of it is stored alike
        assert layers[f"{attention}.qkv_proj"] == "mxfp8"
        assert f"{attention}.index_proj" not in layers
    else:
        assert layers[f"{attention}.qkv_proj"] == "mxfp8"
        assert layers[f"{attention}.index_proj"] == "plain"
    assert layers["model.layers.1.block_sparse_moe.experts"] == quant
    assert layers["model.layers.0.mlp.down_proj"] == "mxfp8"
    cache = {name.split(".")[2]: entry for name, entry in compared.items() if "k_scale" in entry}
    assert cache["1"] == {
        "k_scale": [0.5, 1.5, 3.0, 0.25],
        "v_scale": [2.0, 0.75, 1.0, 4.0],
    }
    # where the cache is not fp8, vLLM's method for mixed formats makes no place in dense layers
    dense = {"0": {"k_scale": [0.5], "v_scale": [0.25]}} if quant == "mxfp8" else {}
    assert {layer: entry for layer, entry in cache.items() if layer != "1"} == dense
    compared = {name: entry for name, entry in compared.items() if "format" in entry}
    wrong = {name: entry for name, entry in compared.items() if entry["difference"] > 0}
    assert wrong == {}


def test_the_chips_of_each_method_are_those_that_fit_names() -> None:
    """vLLM has names of its own for some methods of a checkpoint."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    names: Any = {"modelopt": "modelopt_mixed", "gptq": "auto_gptq", "auto-round": "inc"}
    for method, least in LEAST_CAPABILITY["vLLM"].items():
        config = get_quantization_config(names.get(method, method))
        assert config.get_min_capability() == least, method


def test_other_models_keep_their_quantisation() -> None:
    """In a process of its own: the registration lasts."""
    methods = {
        "MiniMaxM3SparseForConditionalGeneration": "m3_dequantized",
        "MiniMaxM3SparseForCausalLM": "m3_dequantized",
        "DeepseekV3ForCausalLM": None,
        None: None,
    }
    code = (
        "from transformers import PretrainedConfig\n"
        "from tests.plugin.model.test_config import hub\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "method = get_quantization_config('m3_dequantized')\n"
        f"for name in {list(methods)!r}:\n"
        "    config = PretrainedConfig(**hub() | {'architectures': [name] if name else None})\n"
        "    print(method.override_quantization_method({}, None, hf_config=config))\n"
    )
    result = HOST.interpret("-c", code, environment=DEQUANTISE)
    assert result.stdout.split()[-len(methods) :] == [str(method) for method in methods.values()]


def test_methods_are_sent_to_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that has no name in its module cannot be."""
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", [*quantization.QUANTIZATION_METHODS])
    registered: dict[str, Any] = {}
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", registered)
    for method in (PlainWeights, StoredWeights):
        monkeypatch.setattr(method, "architectures", ())
        method.register(("M3",))
    mxfp8 = {"quant_method": "mxfp8", "ignored_layers": []}
    for cls in registered.values():
        sent = pickle.loads(pickle.dumps(cls.from_config(mxfp8)))
        assert type(sent) is cls
    assert len(registered) == 2
