"""MiniMax-M3.1's config is taken only if every key of it is understood: each changed in turn."""

from __future__ import annotations

from typing import Any

import pytest

from m3_plugin.model.config import M3Config
from m3_plugin.model.released import published_config
from m3_plugin.model.taking import draft_refusal, is_dspark, why_not_taken
from m3_plugin.model.vision import VisionConfig
from tests.integrations.foreign import FOREIGN, with_key
from tests.plugin.model.test_taking import another, is_harmless, leaves

NAME = "MiniMaxAI/MiniMax-M3.1-Flash"
QUANTIZATION = "quantization_config."


def changed(path: str, value: Any) -> dict[str, Any]:
    """The published config with one key set, or taken out where the value is None."""
    return with_key(published_config(NAME), path, value)


def reading(config: dict[str, Any]) -> object:
    return M3Config.from_hf(config), VisionConfig.from_hf(config)


def test_it_is_taken() -> None:
    assert why_not_taken(published_config(NAME)) is None


@pytest.mark.parametrize("path", list(leaves(published_config(NAME))))
def test_no_key_changes_unnoticed(path: str) -> None:
    """Changed, a key is refused, or read, or on the list of those that change nothing."""
    value: Any = published_config(NAME)
    for key in path.split("."):
        value = value[key]
    config = changed(path, another(value))
    if why_not_taken(config) is None:
        noticed = reading(config) != reading(published_config(NAME))
        assert noticed or (not path.startswith(QUANTIZATION) and is_harmless(path)), path


@pytest.mark.parametrize("path", FOREIGN)
def test_foreign_keys_are_not_taken_and_named(path: str) -> None:
    reason = why_not_taken(changed(path, FOREIGN[path]))
    assert reason is not None
    assert path.rpartition(".")[2] in reason


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_scheme", "dynamic"),
        ("group_size", 16),
        ("kv_cache_quant_algo", "FP8"),
        ("attention_quant_algo", "FP8"),
        ("index_k_quant_type", "nvfp4"),
        ("packed_modules_mapping", {}),
        ("modules_to_not_convert", ["lm_head", "embed_tokens", "gate", "vision_tower"]),
    ],
)
def test_what_the_published_file_may_say_besides(key: str, value: Any) -> None:
    """Seen in the reader that SGLang has for it; whether the file has them is not known."""
    assert why_not_taken(changed(f"{QUANTIZATION}{key}", value)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_scheme", "static"),
        ("group_size", 32),
        ("kv_cache_quant_algo", "NVFP4"),
        ("attention_quant_algo", "NVFP4"),
        ("index_k_quant_type", "mxfp4"),
        ("weight_block_size", [1, 16]),
        ("moe_quant_algo", "MXFP4"),
        ("moe_quant_algo", None),
        ("moe_quant_format", None),
        ("quant_method", "fp8"),
    ],
)
def test_another_value_is_another_model(key: str, value: Any) -> None:
    assert why_not_taken(changed(f"{QUANTIZATION}{key}", value)) is not None


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("init", [0, 1, 2])
def test_the_file_decides_what_sources_disagree_on(experts: int, init: int) -> None:
    config = changed("text_config.num_experts_per_tok", experts)
    config["text_config"]["sparse_attention_config"]["sparse_init_block"] = init
    read = M3Config.from_hf(config)
    assert read.num_experts_per_token == experts
    assert read.msa is not None
    assert read.msa.num_init_blocks == init


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["DSparkMiniMaxDraftModel"]}, True),
        ({"text_config": {"dspark_block_size": 7}}, True),
        ({"dspark_markov_rank": 256}, True),
        (
            {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "text_config": None},
            False,
        ),
        ({}, False),
    ],
)
def test_a_draft_is_known_by_its_config(config: dict[str, Any], found: bool) -> None:
    """Hosts rename its architecture, so that its keys count as well."""
    assert is_dspark(config) is found
    assert "left unread; do so" in str(draft_refusal("x", instead="do so"))
