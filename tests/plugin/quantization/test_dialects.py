"""Every published `quantization_config` means the same to us as to its exporter.

The samples in tests/data/quantization have the keys of the published configs, cut to four layers
(three dense, one sparse) with two experts.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_plugin.checkpoint.names import linear_shape, text_modules
from m3_plugin.model.config import M3Config
from m3_plugin.quantization.dialects import (
    Names,
    Quantization,
    is_linear,
    read_quantization,
)
from m3_plugin.quantization.formats import (
    GptqInt4,
    Nvfp4,
    PackedInt4,
    Plain,
    stored_bytes,
)
from m3_plugin.testing.quantised import RECIPES, QuantName, quantization_config
from tests.plugin.model.test_config import hub

SAMPLES = Path(__file__).parents[2] / "data" / "quantization"
ATTENTION = "model.layers.3.self_attn.q_proj"
INDEX = "model.layers.3.self_attn.index_k_proj"
DENSE = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.3.block_sparse_moe.experts.1.w3"
SHARED = "model.layers.3.block_sparse_moe.shared_experts.up_proj"
NEVER = (
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    "model.layers.3.input_layernorm",
    "model.layers.3.self_attn.index_q_norm",
    "model.layers.3.block_sparse_moe.gate",
    "model.layers.3.block_sparse_moe.e_score_correction_bias",
)
# sample -> formats of ATTENTION, INDEX, DENSE, EXPERT, SHARED
MEANING = {
    "mxfp8": ("mxfp8",) * 5,
    "modelopt-nvfp4": ("mxfp8", "plain", "mxfp8", "nvfp4", "mxfp8"),
    "quark-mxfp4": ("plain", "plain", "plain", "mxfp4", "plain"),
    "quark-mxfp4-attn-fp8": ("fp8", "plain", "plain", "mxfp4", "plain"),
    "compressed-w4a16": ("int4", "plain", "int4", "int4", "int4"),
    "compressed-awq": ("int4", "plain", "int4", "int4", "int4"),
    "compressed-nvfp4-mxfp8": ("mxfp8", "mxfp8", "mxfp8", "nvfp4", "mxfp8"),
    "auto-round": ("gptq-int4", "plain", "gptq-int4", "gptq-int4", "gptq-int4"),
    "gptq": ("gptq-int4", "plain", "gptq-int4", "gptq-int4", "gptq-int4"),
    "fp8-block": ("fp8-block", "plain", "fp8-block", "fp8-block", "fp8-block"),
}


def sample(name: str) -> dict[str, Any]:
    return json.loads((SAMPLES / f"{name}.json").read_text())["quantization_config"]


def read(name: str, **changes: Any) -> Quantization:
    quantization = read_quantization(sample(name) | changes)
    assert quantization is not None
    return quantization


def test_every_sample_is_in_the_table() -> None:
    assert {file.stem for file in SAMPLES.glob("*.json")} == MEANING.keys()


@pytest.mark.parametrize("name", MEANING)
def test_what_is_stored_how(name: str) -> None:
    quantization = read(name)
    modules = (ATTENTION, INDEX, DENSE, EXPERT, SHARED)
    assert tuple(quantization.format_of(module).name for module in modules) == MEANING[name]
    assert [module for module in NEVER if quantization.format_of(module).name != "plain"] == []


def test_details_that_change_numbers() -> None:
    assert read("compressed-w4a16").format_of(EXPERT) == PackedInt4(128, symmetric=True)
    assert read("compressed-awq").format_of(EXPERT) == PackedInt4(32, symmetric=False)
    assert read("auto-round").format_of(EXPERT) == GptqInt4(128, symmetric=True)
    assert read("gptq", desc_act=True, sym=False, checkpoint_format="gptq_v2").format_of(
        EXPERT
    ) == GptqInt4(128, symmetric=False, act_order=True, stored_zero_offset=0)
    modelopt, compressed = read("modelopt-nvfp4"), read("compressed-nvfp4-mxfp8")
    assert modelopt.format_of(EXPERT) == Nvfp4()
    divided = compressed.format_of(EXPERT)
    assert isinstance(divided, Nvfp4)
    assert divided.divides
    assert modelopt.kv_scales
    assert not compressed.kv_scales


def test_modelopt_s_own_file_has_the_same_keys_one_level_down() -> None:
    inner = sample("modelopt-nvfp4")
    inner.pop("quant_method")
    assert read_quantization({"producer": {}, "quantization": inner}) == read("modelopt-nvfp4")


def test_absent_means_unquantised() -> None:
    assert read_quantization(None) is None
    assert read_quantization({}) is None


@pytest.mark.parametrize("quant", RECIPES)
def test_tiny_checkpoints_declare_what_they_store(quant: QuantName) -> None:
    """Recipe and reader were written apart: one by role, the other by the exporter's lists."""
    config = M3Config.from_hf(hub(num_local_experts=4))
    recipe = RECIPES[quant]
    modules = [f"language_model.{module}" for module in sorted(text_modules(config))]
    quantization = read_quantization(quantization_config(recipe, modules))
    assert quantization is not None
    for module in text_modules(config):
        wanted = recipe.format_of(module)
        found = quantization.format_of(module)
        assert (found == wanted) if wanted else (found.name == "plain"), module


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [
        ("language_model.model.layers.3.self_attn.index_k_proj", True),
        ("model.layers.3.self_attn.index_k_proj", True),
        ("model.language_model.layers.3.self_attn.index_k_proj", True),
        ("model.layers.3.self_attn", True),
        ("self_attn.index_k_proj", True),
        ("index_k_proj", True),
        ("*.index_*_proj", True),
        ("re:.*index_[qk]_proj$", True),
        ("model.layers.33.self_attn.index_k_proj", False),
        ("layers.3.self_attn.index", False),
        ("k_proj", False),
        ("*.k_proj", False),
        ("re:.*[.]k_proj", False),
    ],
)
def test_names_as_exporters_write_them(pattern: str, holds: bool) -> None:
    assert (INDEX in Names((pattern,))) is holds


@pytest.mark.parametrize(
    ("name", "changes", "key", "value"),
    [
        ("mxfp8", {"quant_method": "bitsandbytes"}, "quant_method", "'bitsandbytes'"),
        ("mxfp8", {"weight_block_size": [1, 64]}, "weight_block_size", "[1, 64]"),
        ("mxfp8", {"scale_fmt": "float"}, "scale_fmt", "'float'"),
        ("mxfp8", {"ignored_layers": "lm_head"}, "ignored_layers", "'lm_head'"),
        ("modelopt-nvfp4", {"quant_algo": "W4A8_AWQ"}, "quant_algo", "'W4A8_AWQ'"),
        ("modelopt-nvfp4", {"quantized_layers": {}}, "quantized_layers", "{}"),
        (
            "modelopt-nvfp4",
            {"quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 32}}},
            "quantized_layers.a.group_size",
            "32",
        ),
        ("quark-mxfp4", {"global_quant_config": {"weight": {"dtype": "int8"}}}, "dtype", "'int8'"),
        ("compressed-w4a16", {"format": "int-quantized"}, "group_0", ""),
        ("auto-round", {"packing_format": "auto_round:auto_awq"}, "packing_format", "auto_awq"),
        ("auto-round", {"bits": 3}, "bits", "3"),
        ("auto-round", {"extra_config": {"a": {"bits": 8}}}, "extra_config.a.bits", "8"),
        ("gptq", {"dynamic": {"+:.*w2": {"bits": 8}}}, "dynamic", "8"),
        ("gptq", {"group_size": 0}, "group_size", "0"),
        ("fp8-block", {"fmt": "e5m2"}, "fmt", "'e5m2'"),
        ("fp8-block", {"weight_block_size": [128]}, "weight_block_size", "[128]"),
    ],
)
def test_refusals_name_key_rule_and_value(name: str, changes: dict, key: str, value: str) -> None:
    config = sample(name) | changes
    if key == "group_0":
        config["config_groups"]["group_0"]["format"] = "int-quantized"
        key, value = "format", "'int-quantized'"
    with pytest.raises(ValueError, match="config key 'quantization_config") as error:
        read_quantization(config)
    said = str(error.value)
    assert key in said.split("must be")[0]
    assert value in said.split("got")[1]


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(MEANING)),
    data=st.data(),
    value=st.one_of(st.none(), st.integers(-3, 3), st.text(max_size=3), st.lists(st.none())),
)
def test_a_damaged_section_is_read_or_refused_with_a_message(
    name: str, data: st.DataObject, value: Any
) -> None:
    config = copy.deepcopy(sample(name))
    config[data.draw(st.sampled_from(sorted(config)))] = value
    try:
        read_quantization(config)
        message = "config key: none was wrong"
    except ValueError as error:
        message = str(error)
    assert message.startswith("config key")


def test_shapes_of_linear_weights_are_the_published_ones() -> None:
    config = M3Config.from_hf(hub())
    assert linear_shape(config, ATTENTION) == (8192, 6144)
    assert linear_shape(config, "model.layers.3.self_attn.o_proj") == (6144, 8192)
    assert linear_shape(config, "model.layers.3.self_attn.index_q_proj") == (512, 6144)
    assert linear_shape(config, INDEX) == (128, 6144)
    assert linear_shape(config, DENSE) == (6144, 12288)
    assert linear_shape(config, EXPERT) == (3072, 6144)
    assert linear_shape(config, SHARED) == (3072, 6144)
    assert linear_shape(config, "lm_head") == (200064, 6144)


@pytest.mark.parametrize(("quant", "published"), [("mxfp8", 444), ("nvfp4", 250)])
def test_sizes_at_full_scale_are_the_published_ones(quant: QuantName, published: int) -> None:
    """GB on disk, from the BF16 release's bytes with the linear weights exchanged."""
    config = M3Config.from_hf(hub())
    total = 854_172_958_720
    for module in filter(is_linear, text_modules(config)):
        weight = RECIPES[quant].format_of(module) or Plain()
        rows, columns = linear_shape(config, module)
        total += stored_bytes(weight, rows=rows, columns=columns) - 2 * rows * columns
    assert round(total / 1e9) == published
