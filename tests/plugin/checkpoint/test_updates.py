"""Weights that change while a model serves: what is asked of tensors and folders before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from m3_plugin.checkpoint.finite import require_finite_files
from m3_plugin.checkpoint.loading import WeightLoader, interleave_gate_up, separate_gate_up
from m3_plugin.checkpoint.names import TensorLedger, expert_of, tensor_shape, text_modules
from m3_plugin.checkpoint.updates import (
    LoadedForm,
    VisionWeights,
    checked,
    holds_any,
    require_folder,
)
from m3_plugin.model.config import M3Config
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.plugin.checkpoint.test_loading import CONFIG, Recorder, loader
from tests.plugin.model.test_config import hub

LAYER = "model.layers.0"
HEADS = CONFIG.num_attention_heads * CONFIG.head_dim


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{LAYER}.self_attn.q_proj.weight", (HEADS, CONFIG.hidden_size)),
        (f"{LAYER}.self_attn.index_k_norm.weight", (CONFIG.head_dim,)),
        (f"{LAYER}.block_sparse_moe.gate.weight", (2, CONFIG.hidden_size)),
        (f"{LAYER}.block_sparse_moe.e_score_correction_bias", (2,)),
        (f"{LAYER}.input_layernorm.weight", (CONFIG.hidden_size,)),
        ("model.norm.weight", (CONFIG.hidden_size,)),
        ("lm_head.weight", (CONFIG.vocab_size, CONFIG.hidden_size)),
        (f"{LAYER}.self_attn.k_proj.k_scale", (1,)),
        ("model.mtp.layers.0.enorm.weight", (3,)),
    ],
)
def test_tensors_of_the_model_are_known_by_name_and_shape(
    name: str, shape: tuple[int, ...]
) -> None:
    loader(Recorder()).require_known(name, shape, "BF16")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.9.input_layernorm.weight", (3,), r"layers\.9.* belongs to no module"),
        (f"{LAYER}.self_attn.q_proj.bias", (3,), r"q_proj\.bias is no part of .*unquantised"),
        ("model.norm.weight", (3,), r"model\.norm\.weight must have shape \[\d+\].*got \[3\]"),
        (f"{LAYER}.self_attn.k_proj.k_scale", (3,), r"one for each of the \d+ KV heads"),
    ],
)
def test_others_are_refused_by_name(name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loader(Recorder()).require_known(name, shape, "BF16")


def test_a_bucket_is_checked_before_any_of_it_is_given_out() -> None:
    text, vision = loader(Recorder()), VisionWeights(None, default_loader=lambda *given: None)
    good = ("model.norm.weight", torch.ones(CONFIG.hidden_size))
    with pytest.raises(ValueError, match="got \\[1\\]"):
        checked(text, vision, [good, ("model.norm.weight", torch.ones(1))])
    stream = iter(checked(text, vision, iter([good, ("model.norm.weight", torch.ones(1))])))
    assert next(iter(stream)) is not None
    with pytest.raises(ValueError, match="got \\[1\\]"):
        next(iter(stream))


def test_what_is_no_number_is_refused_before_any_of_a_bucket_is_given_out() -> None:
    text, vision = loader(Recorder()), VisionWeights(None, default_loader=lambda *given: None)
    good = ("model.norm.weight", torch.ones(CONFIG.hidden_size))
    bad = torch.ones(CONFIG.hidden_size)
    bad[3] = torch.inf
    weights = [good, (f"{LAYER}.input_layernorm.weight", bad)]
    said = r"input_layernorm\.weight holds 1 values that are NaN .* \[3\]"
    with pytest.raises(ValueError, match=said):
        checked(text, vision, weights)
    stream = iter(checked(text, vision, iter(weights)))
    assert next(stream)[0] == good[0]
    with pytest.raises(ValueError, match=said):
        next(stream)


def test_a_folder_with_what_is_no_number_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    right = {"b": torch.ones(4), "codes": torch.full((4,), 255, dtype=torch.uint8)}
    save_file(right, file)
    require_finite_files([file])
    save_file(right | {"a": torch.tensor([1.0, torch.nan]).bfloat16()}, file)
    with pytest.raises(ValueError, match=r"a holds 1 values that are NaN .* \[1\] of \[2\]"):
        require_finite_files([file])


def test_the_vision_part_is_passed_over_or_known() -> None:
    VisionWeights(None, default_loader=lambda *given: None).require_known("vision_tower.x", (1,))
    tower = nn.Module()
    tower.patch_merge_mlp = nn.Linear(2, 2)
    vision = VisionWeights(
        tower, default_loader=lambda parameter, tensor: parameter.data.copy_(tensor)
    )
    vision.load("patch_merge_mlp.bias", torch.ones(2))
    assert tower.patch_merge_mlp.bias.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"lacks 1 vision tensor\(s\): .*weight"):
        vision.finish()
    assert vision.finish(partial=True) == {"vision_tower.patch_merge_mlp.bias"}
    with pytest.raises(ValueError, match=r"must have shape \[2\]"):
        vision.load("patch_merge_mlp.bias", torch.ones(3))


def test_packed_parameters_are_told_from_those_as_loaded() -> None:
    parameters = {
        name: nn.Parameter(torch.randn(32, 64))
        for name in ("same", "moved", "shuffled", "tiled", "emptied")
    }
    form = LoadedForm()
    assert form.packed(parameters) == parameters.keys()
    form.remember(parameters)
    assert form.packed(parameters) == frozenset()
    parameters["moved"] = nn.Parameter(parameters["moved"].data.clone())
    parameters["shuffled"].data = parameters["shuffled"].data.flip(0)
    tiles = parameters["tiled"].data.view(2, 16, 64).transpose(1, 2)
    parameters["tiled"].data = tiles.reshape(32, 64)
    parameters["emptied"].data = torch.empty(0)
    assert form.packed(parameters) == {"shuffled", "tiled", "emptied"}


def test_gate_and_up_rows_come_back() -> None:
    w13 = torch.randn(3, 8, 5)
    assert torch.equal(separate_gate_up(interleave_gate_up(w13)), w13)


def test_experts_of_other_ranks_may_be_missing() -> None:
    expected = text_modules(CONFIG)
    absent = frozenset(module for module in expected if expert_of(module) == 1)
    assert len(absent) == 3
    ledger = TensorLedger(expected, absent)
    for module in expected - absent:
        assert ledger.add(module)
    ledger.require_complete()
    with pytest.raises(ValueError, match="missing 3"):
        TensorLedger(expected, seen=ledger.seen).require_complete()


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_random_checkpoint(tmp_path / "engine", preset="engine")

    def text(self, folder: Path) -> WeightLoader:
        import json

        config = M3Config.from_hf(json.loads((folder / "config.json").read_text()))
        return WeightLoader(
            nn.Module(),
            config=config,
            expected=text_modules(config),
            fused={},
            experts=(),
            default_loader=lambda *given: None,
        )

    def test_the_same_shapes_may_take_its_place(self, folder: Path) -> None:
        text = self.text(folder)
        require_folder(folder, text, VisionWeights(None, default_loader=lambda *given: None))
        assert holds_any(folder, text)

    def test_another_model_s_may_not(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"must have shape|belongs to no module"):
            require_folder(
                folder, loader(Recorder()), VisionWeights(None, default_loader=lambda *given: None)
            )


def test_shapes_are_those_of_the_released_model() -> None:
    config = M3Config.from_hf(hub())
    assert tensor_shape(config, "model.layers.5.block_sparse_moe.gate") == (128, 6144)
    assert tensor_shape(config, "model.layers.5.self_attn.index_q_norm") == (128,)
    assert tensor_shape(config, "model.embed_tokens") == (config.vocab_size, 6144)
