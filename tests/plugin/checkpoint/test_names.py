"""The tensor ledger: complete checkpoints pass, any lost or extra tensor is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from m3_plugin.checkpoint.names import (
    TEXT_PREFIX,
    TensorLedger,
    count_mtp_modules,
    is_mtp_tensor,
    layer_of,
    mtp_modules,
    text_modules,
)
from m3_plugin.model.config import M3Config
from m3_plugin.testing.hub_layout import tensor_shapes
from m3_plugin.testing.random_checkpoint import PRESETS
from tests.plugin.model.test_config import HUB, hub

CONFIG = M3Config.from_hf(HUB)


def test_released_checkpoint_has_the_published_number_of_text_tensors() -> None:
    """3 root, 11 per dense layer, 401 per sparse MoE layer (the released index's inventory)."""
    assert len(text_modules(CONFIG)) == 3 + 3 * 11 + 57 * 401


def ledger_with(*, without: str = "", extra: str = "") -> TensorLedger:
    ledger = TensorLedger(text_modules(CONFIG))
    for module in text_modules(CONFIG):
        name = module if module.endswith("e_score_correction_bias") else f"{module}.weight"
        if module != without:
            assert ledger.add(name)
    if extra:
        assert not ledger.add(extra)
    return ledger


def test_complete() -> None:
    ledger_with().require_complete()


def test_scales_beside_a_weight_are_part_of_its_module() -> None:
    ledger = ledger_with()
    assert ledger.add("model.layers.5.self_attn.q_proj.weight_scale_inv")
    ledger.require_complete()


def test_index_branches_are_unread_only_where_every_layer_is_dense() -> None:
    branches = [
        f"model.layers.{layer}.self_attn.index_{part}.weight"
        for layer in (3, 59)
        for part in ("q_proj", "k_proj", "q_norm", "k_norm")
    ]
    dense = M3Config.from_hf(hub(sparse_attention_config={"use_sparse_attention": False}))
    ledger = TensorLedger(text_modules(dense))
    for module in text_modules(dense):
        ledger.add(f"{module}.weight" if "correction_bias" not in module else module)
    assert not any(map(ledger.add, branches))
    ledger.require_complete()
    for stranger in ("model.layers.60.self_attn.index_q_proj.weight", "model.layers.3.index_q"):
        ledger.add(stranger)
        with pytest.raises(ValueError, match=rf"left over 1 tensor\(s\): {stranger}"):
            ledger.require_complete()
        ledger.leftover.clear()
    # a dense layer of a sparse model has no branch
    with pytest.raises(ValueError, match="left over"):
        ledger_with(extra="model.layers.0.self_attn.index_q_proj.weight").require_complete()


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.7.block_sparse_moe.experts.127.w2",
        "model.layers.59.self_attn.index_k_proj",
        "model.layers.3.block_sparse_moe.e_score_correction_bias",
        "lm_head",
    ],
)
def test_one_missing_tensor_is_named(module: str) -> None:
    with pytest.raises(ValueError, match=rf"missing 1 tensor\(s\): {module}"):
        ledger_with(without=module).require_complete()


def test_one_extra_tensor_is_named() -> None:
    extra = "model.layers.0.self_attn.index_q_proj.weight"
    with pytest.raises(ValueError, match=rf"left over 1 tensor\(s\): {extra}"):
        ledger_with(extra=extra).require_complete()


def test_mtp_and_layer_names() -> None:
    assert is_mtp_tensor("model.mtp.layers.0.enorm.weight")
    assert not is_mtp_tensor("model.layers.0.mlp.up_proj.weight")
    assert layer_of("model.layers.41.input_layernorm.weight") == 41
    assert layer_of("lm_head.weight") is None


def test_mtp_modules_are_what_test_checkpoints_hold() -> None:
    """Four tensors of its own and a sparse decoder layer; nothing of the target."""
    shape = replace(PRESETS["kernel"], num_mtp_modules=2)
    names = [name.removeprefix(TEXT_PREFIX) for name, _ in tensor_shapes(shape)]
    config = M3Config.from_hf(hub(num_local_experts=shape.num_local_experts))
    ledger = TensorLedger(mtp_modules(config, num_modules=2))
    assert all(ledger.add(name) == is_mtp_tensor(name) for name in names)
    assert ledger.seen == ledger.expected
    assert len(ledger.expected) == 2 * (4 + 2 + 10 + 2 + 3 + 3 * shape.num_local_experts)


def test_mtp_modules_are_counted_from_the_tensors() -> None:
    assert count_mtp_modules(["model.mtp.layers.0.enorm.weight", "model.layers.5.x"]) == 1
    assert count_mtp_modules([f"language_model.model.mtp.layers.{i}.enorm" for i in (1, 0)]) == 2
    assert count_mtp_modules(["model.layers.0.input_layernorm.weight"]) == 0
    with pytest.raises(ValueError, match=r"without a gap, got \[1\]"):
        count_mtp_modules(["model.mtp.layers.1.enorm.weight"])
