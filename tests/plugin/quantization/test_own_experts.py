"""MXFP8 beside NVFP4 experts, as M3.1 is stored: read from the fields, by whatever name it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m3_plugin.checkpoint.names import is_draft_tensor
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_plugin.model.taking import why_not_taken
from m3_plugin.quantization.codecs import dequantise
from m3_plugin.quantization.dialects import Quantization, read_quantization
from m3_plugin.quantization.formats import Mxfp8, Nvfp4, Plain

SECTION: dict[str, Any] = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "moe_quant_algo": "NVFP4",
    "moe_quant_format": "nvfp4-pack-quantized",
    "ignored_layers": ["lm_head", "model.embed_tokens"],
}
EXPERT = "model.layers.7.block_sparse_moe.experts.127.w2"


def read(**changes: object) -> Quantization:
    found = read_quantization(SECTION | changes)
    assert found is not None
    return found


def test_only_routed_experts_are_nvfp4() -> None:
    found = read()
    assert found.has_own_experts
    assert str(found) == "mxfp8 (nvfp4, mxfp8)"
    weight = found.format_of(EXPERT)
    assert isinstance(weight, Nvfp4)
    assert weight.parts(64, 32).keys() == {
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "input_global_scale",
    }
    for module in (
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.index_k_proj",
        "model.layers.7.self_attn.q_proj",
        "model.layers.7.block_sparse_moe.shared_experts.down_proj",
    ):
        assert isinstance(found.format_of(module), Mxfp8), module
    for module in ("lm_head", "model.embed_tokens", "model.layers.7.block_sparse_moe.gate"):
        assert isinstance(found.format_of(module), Plain), module


def test_m3_s_own_mxfp8_is_another_format() -> None:
    section = {k: v for k, v in SECTION.items() if not k.startswith("moe_")}
    found = read_quantization(section)
    assert found is not None
    assert not found.has_own_experts
    assert isinstance(found.format_of(EXPERT), Mxfp8)


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model."])
def test_kept_modules_under_either_key_and_any_prefix(key: str, prefix: str) -> None:
    section = {k: v for k, v in SECTION.items() if k != "ignored_layers"}
    found = read_quantization(section | {key: [f"{prefix}layers.7.self_attn.q_proj"]})
    assert found is not None
    assert isinstance(found.format_of("model.layers.7.self_attn.q_proj"), Plain)
    assert isinstance(found.format_of("model.layers.7.self_attn.k_proj"), Mxfp8)


@pytest.mark.parametrize(
    "values",
    [
        {"moe_quant_algo": "nvfp4"},
        {"group_size": 16, "kv_cache_quant_algo": "FP8", "attention_quant_algo": "fp8"},
        {"index_k_quant_type": "NVFP4", "packed_modules_mapping": {}},
    ],
)
def test_what_says_nothing_new_is_taken(values: dict[str, object]) -> None:
    assert read(**values).has_own_experts


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_quant_algo", "MXFP4"),
        ("moe_quant_algo", None),
        ("moe_quant_format", "nvfp4-swizzled"),
        ("moe_quant_format", None),
        ("group_size", 32),
        ("kv_cache_quant_algo", "NVFP4"),
        ("attention_quant_algo", "INT8"),
        ("index_k_quant_type", "fp8"),
        ("router_quant_algo", "FP8"),
    ],
)
def test_what_may_be_another_storage_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        read(**{key: value})


def test_a_cache_key_without_own_experts_stays_unknown() -> None:
    with pytest.raises(ValueError, match=r"index_k_quant_type.*without moe_quant_algo"):
        read_quantization({"quant_method": "mxfp8", "index_k_quant_type": "nvfp4"})


def test_the_architecture_s_name_plays_no_part() -> None:
    """A derivative in 16 bits has M3.1's layers, and one of M3 has M3.1's quantisation."""
    config = released_config()
    text = config["text_config"]
    layers = text["num_hidden_layers"]
    sparse = text["sparse_attention_config"] | {
        "sparse_attention_freq": [1] * layers,
        "sparse_disable_index_value": [1] * layers,
    }
    derived = config | {"text_config": text | {"sparse_attention_config": sparse}}
    assert why_not_taken(derived) is None
    read_derived = M3Config.from_hf(derived)
    assert all(read_derived.sparse_layers)
    assert read_derived.moe_layers == (False,) * 3 + (True,) * (layers - 3)
    quantised = M3Config.from_hf(config | {"quantization_config": SECTION})
    assert quantised.quantization is not None
    assert quantised.quantization.has_own_experts
    assert not quantised.sparse_layers[0]


def test_the_scale_of_the_tensor_divides() -> None:
    parts = {
        # 0.5 in the low half, -6 in the high one
        "weight_packed": torch.full((1, 8), 0xF1, dtype=torch.uint8),
        "weight_scale": torch.full((1, 1), 2.0).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([4.0]),
    }
    values = dequantise(read().of_experts, parts)
    assert values.tolist() == [[0.25, -3.0] * 8]


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("language_model.model.dspark.fc.weight", True),
        ("model.dspark.layers.0.decoder_layer.mlp.gate_proj.weight_scale_inv", True),
        ("dspark.confidence_head.proj.bias", True),
        ("language_model.model.mtp.layers.0.enorm.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", False),
        ("model.dsparkle.weight", False),
    ],
)
def test_tensors_of_drafts_are_foreign(name: str, draft: bool) -> None:
    assert is_draft_tensor(name) is draft
