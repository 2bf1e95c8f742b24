"""M3Config: every dialect gives one meaning, every config M3 cannot be served with is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config

HUB = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "text_config": {
        "vocab_size": 200064,
        "hidden_size": 6144,
        "num_hidden_layers": 60,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 1048576,
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "dense_intermediate_size": 12288,
        "intermediate_size": 3072,
        "shared_intermediate_size": 3072,
        "moe_layer_freq": [0] * 3 + [1] * 57,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "tie_word_embeddings": False,
        "num_mtp_modules": 7,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": [0] * 3 + [1] * 57,
            "sparse_num_index_heads": 4,
            "sparse_index_dim": 128,
            "sparse_block_size": 128,
            "sparse_topk_blocks": 16,
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_score_type": "max",
            "sparse_disable_index_value": [0] * 3 + [1] * 57,
        },
    },
}


def hub(**text: Any) -> dict[str, Any]:
    """The released config with keys of `text_config` replaced; None removes a key."""
    config = copy.deepcopy(HUB)
    for key, value in text.items():
        section = config["text_config"]
        if key.startswith("sparse_") and key != "sparse_attention_config":
            section = section["sparse_attention_config"]
        if value is None:
            section.pop(key, None)
        else:
            section[key] = value
    return config


def test_released_config() -> None:
    config = M3Config.from_hf(HUB)
    assert config.num_sparse_layers == 57
    assert config.sparse_layers[:4] == (False, False, False, True)
    assert config.moe_layers == config.sparse_layers
    assert config.rotary_dim == 64
    assert config.swiglu_beta == 1.0
    assert config.msa is not None
    assert config.msa.dense_context == 2048
    config.require_paged_host()


def test_text_part_alone_means_the_same() -> None:
    assert M3Config.from_hf(HUB["text_config"]) == M3Config.from_hf(HUB)


def test_transformers_dialect_means_the_same() -> None:
    """The keys transformers writes after converting the hub config."""
    text = dict(HUB["text_config"])
    sparse = text.pop("sparse_attention_config")
    freq = text.pop("moe_layer_freq")
    text.pop("rope_theta")
    text.pop("partial_rotary_factor")
    text |= {
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
        "mlp_layer_types": ["sparse" if flag else "dense" for flag in freq],
        "index_n_heads": sparse["sparse_num_index_heads"],
        "index_head_dim": sparse["sparse_index_dim"],
        "index_block_size": sparse["sparse_block_size"],
        "index_topk_blocks": sparse["sparse_topk_blocks"],
        "index_local_blocks": sparse["sparse_local_block"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    converted = M3Config.from_hf({"model_type": "minimax_m3_vl", "text_config": text})
    assert converted.dialect == "transformers"
    original = M3Config.from_hf(HUB)
    for name in original.__dataclass_fields__:
        if name != "dialect":
            assert getattr(converted, name) == getattr(original, name), name


def test_transformers_own_classes_agree() -> None:
    """The real converter, not our idea of it."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "MiniMaxM3VLConfig"):
        pytest.skip("this transformers has no MiniMax-M3")
    converted = transformers.MiniMaxM3VLConfig(**copy.deepcopy(HUB)).to_dict()
    assert M3Config.from_hf(converted).msa == M3Config.from_hf(HUB).msa
    assert M3Config.from_hf(converted).sparse_layers == M3Config.from_hf(HUB).sparse_layers
    assert M3Config.from_hf(converted).rotary_dim == 64


@pytest.mark.parametrize("level", ["top", "text"])
def test_quantised_dialect(level: str) -> None:
    config = copy.deepcopy(HUB)
    section = config if level == "top" else config["text_config"]
    section["quantization_config"] = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    quantization = M3Config.from_hf(config).quantization
    assert quantization is not None
    assert quantization.method == "mxfp8"


def test_successor_layout_is_honoured() -> None:
    """Init blocks and arbitrary per-layer lists, as the successor model publishes them."""
    freq = [1, 0] * 30
    config = M3Config.from_hf(
        hub(
            sparse_attention_freq=freq,
            sparse_init_block=1,
            sparse_disable_index_value=freq,
            moe_layer_freq=[1] * 60,
        )
    )
    assert config.sparse_layers == tuple(bool(flag) for flag in freq)
    assert all(config.moe_layers)
    assert config.msa is not None
    assert config.msa.num_init_blocks == 1


def test_no_sparse_layer_means_no_msa() -> None:
    section = {**HUB["text_config"]["sparse_attention_config"], "use_sparse_attention": False}
    config = M3Config.from_hf(hub(sparse_attention_config=section))
    assert config.msa is None
    assert config.num_sparse_layers == 0
    config.require_paged_host()


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"rotary_dim": 32}, "rotary_dim", "32"),
        ({"rotary_dim": None, "partial_rotary_factor": None}, "rotary_dim", "None"),
        ({"sparse_disable_index_value": [0] * 60}, "sparse_disable_index_value", "[3, 4"),
        ({"sparse_score_type": "lse"}, "sparse_score_type", "'lse'"),
        ({"sparse_local_block": None}, "sparse_local_block", "None"),
        ({"sparse_num_index_heads": 3}, "sparse_num_index_heads", "3"),
        ({"sparse_num_index_heads": 8}, "sparse_num_index_heads", "8"),
        ({"sparse_topk_blocks": 0}, "sparse_topk_blocks", "0"),
        ({"sparse_init_block": 16}, "sparse_topk_blocks", "16"),
        ({"sparse_attention_freq": [1] * 59}, "sparse_attention_freq", "[1, 1"),
        ({"moe_layer_freq": None}, "moe_layer_freq", "None"),
        ({"num_attention_heads": 66}, "num_attention_heads", "66"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok", "129"),
        ({"qk_norm_type": "flat"}, "qk_norm_type", "'flat'"),
        ({"use_gemma_norm": False}, "use_gemma_norm", "False"),
        ({"attention_output_gate": True}, "attention_output_gate", "True"),
        ({"scoring_func": "softmax"}, "scoring_func", "'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
        ({"hidden_size": "6144"}, "hidden_size", "'6144'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type", "'yarn'"),
        ({"sparse_attention_config": [1]}, "sparse_attention_config", "[1]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_refusals_name_key_rule_and_value(change: dict, key: str, value: str) -> None:
    with pytest.raises(ValueError, match="config key") as error:
        M3Config.from_hf(hub(**change))
    message = str(error.value)
    assert key in message.split("must be")[0]
    assert value in message.split("got")[1]


def test_block_size_is_refused_on_a_paged_host_only() -> None:
    config = M3Config.from_hf(hub(sparse_block_size=64))
    with pytest.raises(ValueError, match=r"sparse_block_size.*128.*got 64"):
        config.require_paged_host()


@given(
    key=st.sampled_from(sorted(HUB["text_config"])),
    value=st.one_of(
        st.none(), st.integers(-5, 5), st.text(max_size=3), st.lists(st.integers(0, 1), max_size=3)
    ),
)
def test_a_damaged_config_is_read_or_refused_with_a_message(key: str, value: Any) -> None:
    """Whatever stands under a key: a config, or a ValueError that speaks of the config."""
    try:
        M3Config.from_hf(hub(**{key: value}))
        message = "config key: none was wrong"
    except ValueError as error:
        message = str(error)
    assert message.startswith("config key")


@pytest.mark.parametrize("whose", ["", "text_config"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_refused_wherever_it_is_written(whose: str, key: str) -> None:
    """YaRN as published recipes override it, for the whole config or its text part."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 524_288}
    written = copy.deepcopy(released_config())
    holder = written[whose] if whose else written
    holder[key] = yarn
    with pytest.raises(ValueError, match=r"config key '(text_config\.)?rope_"):
        M3Config.from_hf(written)
