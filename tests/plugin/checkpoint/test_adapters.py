"""Names of an adapter: as published and as transformers has them, and all that is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest

from m3_plugin.checkpoint.adapters import (
    ADAPTED,
    ADAPTER_PARTS,
    adapted_module,
    adapted_tensor,
    require_adapter_config,
    require_adapter_shapes,
    wanted_projections,
)
from m3_plugin.checkpoint.names import text_modules
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config

CONFIG = M3Config.from_hf(released_config())
PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("part", "module"),
    [
        ("layers.3.self_attn.q_proj", "layers.3.self_attn.q_proj"),
        ("layers.3.self_attn.indexer.k_proj", "layers.3.self_attn.index_k_proj"),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.gate_proj"),
        ("layers.3.mlp.shared_experts.up_proj", "layers.3.block_sparse_moe.shared_experts.up_proj"),
    ],
)
def test_dialects(prefix: str, part: str, module: str) -> None:
    assert adapted_module(prefix + part, CONFIG) == f"model.{module}"


def test_each_module_is_taken_or_refused() -> None:
    """Of the whole checkpoint: whatever is taken lies where it says, and experts never are."""
    taken = set()
    for module in text_modules(CONFIG):
        with suppress(ValueError):
            taken.add(adapted_module(module, CONFIG))
    assert taken == {
        module
        for module in text_modules(CONFIG)
        if module.rpartition(".")[2] in ADAPTED and ".experts." not in module
    }


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.60.self_attn.q_proj",
        "model.layers.0.self_attn.index_q_proj",
        "model.layers.0.block_sparse_moe.shared_experts.up_proj",
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.self_attn.q_norm",
        "vision_tower.layers.3.self_attn.q_proj",
        "model.mtp.layers.0.transformer_layer.self_attn.q_proj",
        "layers.x.self_attn.q_proj",
    ],
)
def test_refused(module: str) -> None:
    with pytest.raises(ValueError, match="adapter module"):
        adapted_module(module, CONFIG)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_tensors(prefix: str) -> None:
    name = f"base_model.model.{prefix}layers.3.self_attn.index_q_proj"
    for part in ADAPTER_PARTS:
        assert adapted_tensor(f"{name}.{part}", CONFIG) == (
            "model.layers.3.self_attn.index_q_proj",
            part,
        )
    for part in ("lora_B.bias", "weight", "lora_embedding_A"):
        with pytest.raises(ValueError, match="only lora_A and lora_B of projections"):
            adapted_tensor(f"{name}.{part}", CONFIG)


def test_pairs_are_whole_and_of_this_model() -> None:
    module = "model.layers.3.self_attn.index_k_proj"
    a, b = ADAPTER_PARTS
    right = {a: (8, 6144), b: (128, 8)}
    require_adapter_shapes(module, right, rank=8, config=CONFIG)
    for wrong, message in (
        ({b: (128, 8)}, "lora_A.weight is missing"),
        ({a: (8, 6144)}, "lora_B.weight is missing"),
        ({**right, a: (8, 6143)}, r"must have shape \[8, 6144\] at r = 8; got \[8, 6143\]"),
        ({**right, b: (128, 4)}, r"must have shape \[128, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            require_adapter_shapes(module, wrong, rank=8, config=CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("init_lora_weights", "pissa"),
        ("bias", "all"),
    ],
)
def test_a_config_that_says_more_is_refused(key: str, value: object) -> None:
    plain = {"r": 8, "lora_alpha": 16, "bias": "none", "rank_pattern": {}, "use_rslora": False}
    require_adapter_config({**plain, "init_lora_weights": "gaussian"})
    with pytest.raises(ValueError, match=f"key '{key}' must be .*; got"):
        require_adapter_config({**plain, key: value})


def test_target_modules() -> None:
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    assert wanted_projections(None, fused=fused) == {*ADAPTED}
    assert wanted_projections({"all"}, fused=fused) == {*ADAPTED}
    assert wanted_projections(["qkv_proj"], fused=fused) == {"q_proj", "k_proj", "v_proj"}
    with pytest.raises(ValueError, match="lm_head: adapters are taken by"):
        wanted_projections(["q_proj", "lm_head"], fused=fused)
