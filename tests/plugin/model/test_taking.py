"""A config is taken only if every key of it is understood: each key is changed in turn."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.model import known_keys
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import published_models, released_config
from m3_plugin.model.taking import refusal, stands_aside, why_not_taken
from m3_plugin.model.vision import VisionConfig
from tests.integrations.foreign import FOREIGN, MXFP8, changed

QUANTIZED = Path(__file__).parents[2] / "data" / "quantization"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys without keys of their own."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def another(value: object) -> object:
    """A value of the same kind that says something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, str):
        return f"other_{value}"
    assert isinstance(value, list)
    # flags per layer, or architectures
    return [1 - entry if isinstance(entry, int) else another(entry) for entry in value]


def reading(config: Mapping[str, Any]) -> object:
    return M3Config.from_hf(config), VisionConfig.from_hf(config)


def is_harmless(path: str) -> bool:
    section = known_keys.TOP
    *sections, key = path.split(".")
    for name in sections:
        section = {
            "text_config": known_keys.TEXT,
            "vision_config": known_keys.VISION,
        }.get(name) or section.inner[name]
    return key in section.harmless


@pytest.mark.parametrize("path", list(leaves(released_config())))
def test_no_key_changes_unnoticed(path: str) -> None:
    """Changed, a key is refused, or read, or on the list of those that change nothing."""
    value: Any = released_config()
    for key in path.split("."):
        value = value[key]
    config = changed(path, another(value))
    if why_not_taken(config) is None:
        assert reading(config) != reading(released_config()) or is_harmless(path), path


@pytest.mark.parametrize("path", FOREIGN)
def test_foreign_keys_are_not_taken_and_named(path: str) -> None:
    reason = why_not_taken(changed(path, FOREIGN[path]))
    assert reason is not None
    assert path.rpartition(".")[2] in reason
    assert "\n" not in stands_aside("vLLM", reason)
    assert path.rpartition(".")[2] in str(refusal("vLLM", reason, required=False))


@pytest.mark.parametrize(
    "section",
    [
        "",
        "text_config.",
        "text_config.sparse_attention_config.",
        "vision_config.",
        "img_token_compression_config.",
        "quantization_config.",
    ],
)
def test_a_key_on_no_list_is_not_harmless(section: str) -> None:
    assert why_not_taken(changed(f"{section}newly_invented", 1)) is not None
    # nothing is said by these
    for empty in ({}, []):
        assert why_not_taken(changed(f"{section}newly_invented", empty)) is None


def test_the_same_holds_for_the_text_part_alone_and_for_drafts() -> None:
    text = copy.deepcopy(released_config()["text_config"])
    assert why_not_taken(text) is None
    assert why_not_taken(text, draft=True) is None
    text["index_topk_freq"] = 2
    for draft in (False, True):
        assert "index_topk_freq" in str(why_not_taken(text, draft=draft))


@pytest.mark.parametrize("name", published_models())
def test_published_models_are_taken(name: str) -> None:
    quantization = published_models()[name]
    extra = {"quantization_config": quantization} if quantization else {}
    assert why_not_taken(released_config() | extra) is None


@pytest.mark.parametrize("file", sorted(QUANTIZED.glob("*.json")), ids=lambda file: file.stem)
def test_every_dialect_of_quantised_m3_is_taken_but_for_an_unknown_key(file: Path) -> None:
    quantization = json.loads(file.read_text())
    assert why_not_taken(released_config() | quantization) is None
    quantization["quantization_config"]["moe_quant_algo"] = "INT2"
    assert "moe_quant_algo" in str(why_not_taken(released_config() | quantization))


def test_both_spellings_of_unquantised_modules_are_read() -> None:
    for key in ("ignored_layers", "modules_to_not_convert"):
        config = M3Config.from_hf(
            released_config()
            | {"quantization_config": {"quant_method": "mxfp8", key: ["index_q_proj"]}}
        )
        assert config.quantization is not None
        module = "model.layers.3.self_attn.{}"
        assert config.quantization.format_of(module.format("index_q_proj")).name == "plain"
        assert config.quantization.format_of(module.format("index_k_proj")).name == "mxfp8"
    assert MXFP8["quant_method"] == "mxfp8"


def test_what_transformers_makes_of_the_config_is_taken() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "MiniMaxM3VLConfig"):
        pytest.skip("this transformers has no MiniMax-M3")
    config = transformers.MiniMaxM3VLConfig(**copy.deepcopy(released_config())).to_dict()
    assert why_not_taken(config) is None
    assert transformers.PretrainedConfig().to_dict().keys() <= known_keys.TOP.harmless
