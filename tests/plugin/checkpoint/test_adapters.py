"""Names of an adapter: as published and as transformers has them, and all that is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest

from m3_plugin.checkpoint.adapters import ADAPTED, adapted_module
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
