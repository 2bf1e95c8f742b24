"""Loading shared by the hosts: names to parameters, and what may not go unnoticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.checkpoint.loading import WeightLoader, interleave_gate_up
from m3_plugin.checkpoint.names import linear_shape, text_modules
from m3_plugin.checkpoint.stream import Packer
from m3_plugin.model.config import M3Config
from m3_plugin.quantization.dialects import read_quantization
from tests.plugin.model.test_config import hub

CONFIG = M3Config.from_hf(
    hub(
        num_hidden_layers=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        moe_layer_freq=[1],
        sparse_attention_freq=[1],
        sparse_disable_index_value=[1],
    )
)
FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "index_q_proj": ("qkv_proj", "index_q"),
    "index_k_proj": ("qkv_proj", "index_k"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
EXPERTS = [
    (f"experts.{'w2' if part == 'w2' else 'w13'}_", f"experts.{expert}.{part}.", expert, part)
    for expert in range(2)
    for part in ("w1", "w2", "w3")
]


class Recorder(nn.Module):
    """A model whose parameters only note what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple] = []
        self.finished = 0
        names = set()
        for module in text_modules(CONFIG):
            name = module if module.endswith("correction_bias") else f"{module}.weight"
            for part, (fused, _) in FUSED.items():
                name = name.replace(f".{part}.", f".{fused}.")
            for parameter, weight, _, _ in EXPERTS:
                name = name.replace(weight, parameter)
            names.add(name)
        self.table = {name: self._parameter() for name in names}

    def _parameter(self) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(1))
        parameter.weight_loader = lambda *given, **named: self.notes.append((given[2:], named))  # type: ignore[attr-defined]
        return parameter

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[override]
        return iter(self.table.items())

    def finish_loading(self) -> None:
        self.finished += 1


def loader(model: Recorder, **options: object) -> WeightLoader:
    return WeightLoader(
        model,
        config=CONFIG,
        expected=text_modules(CONFIG),
        fused=FUSED,
        experts=EXPERTS,
        default_loader=lambda parameter, tensor: None,
        **options,  # type: ignore[arg-type]
    )


def tensors() -> list[str]:
    return [
        module if module.endswith("correction_bias") else f"{module}.weight"
        for module in sorted(text_modules(CONFIG))
    ]


def test_every_tensor_reaches_a_parameter_and_modules_finish_once() -> None:
    model = Recorder()
    target = loader(model)
    for name in [*tensors(), "model.mtp.layers.0.enorm.weight"]:
        target.load(name, torch.ones(1))
    assert target.finish() == set(model.table)
    assert model.finished == 1
    assert len(model.notes) == len(tensors())


def test_parts_carry_their_shard_and_expert() -> None:
    model = Recorder()
    target = loader(model)
    target.load("model.layers.0.self_attn.index_k_proj.weight", torch.ones(1))
    target.load("model.layers.0.block_sparse_moe.experts.1.w3.weight", torch.ones(1))
    (index, expert) = model.notes
    assert index == (("index_k",), {})
    assert expert[1] == {"shard_id": "w3", "expert_id": 1}
    assert expert[0] == ("model.layers.0.block_sparse_moe.experts.w13_weight",)


def test_another_stage_is_counted_but_not_loaded() -> None:
    model = Recorder()
    target = loader(model, is_elsewhere=lambda name: name.startswith("lm_head"))
    for name in tensors():
        target.load(name, torch.ones(1))
    assert "lm_head.weight" not in target.finish()


def test_a_promised_tensor_without_a_parameter_is_an_error() -> None:
    model = Recorder()
    target = loader(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight_scale has no counterpart.*quantisation"):
        target.load("model.layers.0.self_attn.q_proj.weight_scale", torch.ones(1))


def test_gate_and_up_rows_are_interleaved_per_expert() -> None:
    w13: Tensor = torch.arange(2 * 6).view(2, 6, 1)
    assert interleave_gate_up(w13).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


class StoresItself(nn.Module):
    """An attention module that stores K and V by itself, or one of the host's, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[CacheScales] = []

    def take_cache_scales(self, scales: CacheScales) -> None:
        self.taken.append(scales)


class OneLayer(Recorder):
    """`Recorder` with an attention module at the checkpoint's name for it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.add_module("attention", attention)

    def named_modules(self, *args: object, **kwargs: object):  # type: ignore[override]
        return iter({"": self, SELF_ATTENTION: self.attention}.items())


SELF_ATTENTION = "model.layers.0.self_attn"


def load_with_scales(model: nn.Module, scales: dict[str, Tensor]) -> WeightLoader:
    target = loader(model)  # type: ignore[arg-type]
    for name in tensors():
        target.load(name, torch.ones(1))
    for name, scale in scales.items():
        target.load(f"{SELF_ATTENTION}.{name}", scale)
    target.finish()
    return target


def test_scales_of_the_cache_reach_the_layer_that_stores() -> None:
    attention = StoresItself()
    given = {"k_scale": torch.rand(4, 1, 1), "v_scale": torch.rand(1), "q_scale": torch.rand(64)}
    load_with_scales(OneLayer(attention), given)
    (taken,) = attention.taken
    assert taken.k is not None
    assert taken.v is not None
    assert torch.equal(taken.k, given["k_scale"].flatten())
    assert torch.equal(taken.v, given["v_scale"])


def test_a_checkpoint_without_scales_has_unit_scale_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attention = StoresItself()
    with caplog.at_level("INFO"):
        load_with_scales(OneLayer(attention), {})
    assert attention.taken == [CacheScales()]
    assert "scales for an fp8 KV cache: none in the checkpoint, unit scale" in caplog.text


def test_a_host_s_single_scale_saturates_no_head() -> None:
    model = OneLayer(nn.Module())
    given: dict[str, Tensor] = {}
    for name in ("k_scale", "v_scale"):
        parameter = nn.Parameter(torch.tensor(-1.0))
        parameter.weight_loader = lambda parameter, scale, name=name: given.update({name: scale})  # type: ignore[attr-defined]
        model.table[f"{SELF_ATTENTION}.attn.{name}"] = parameter
    scales = {"k_scale": torch.tensor([0.5, 2.0, 1.0, 0.1]), "v_scale": torch.tensor(3.0)}
    load_with_scales(model, scales)
    assert (given["k_scale"].tolist(), given["v_scale"].tolist()) == ([2.0], [3.0])


def test_scales_of_the_cache_without_a_place_are_said_and_not_lost_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ones = torch.ones(1)
    load_with_scales(Recorder(), {"k_proj.k_scale": ones, "v_proj.v_scale": ones})
    assert f"the scales of 1 layers for an fp8 KV cache, such as those of {SELF_ATTENTION}" in (
        caplog.text
    )
    assert "unit scale there" in caplog.text


def test_a_cache_scale_of_a_layer_that_is_not_there_is_left_over() -> None:
    target = loader(Recorder())
    for name in [*tensors(), "model.layers.7.self_attn.k_scale"]:
        target.load(name, torch.ones(1))
    with pytest.raises(ValueError, match=r"left over 1 tensor\(s\): model\.layers\.7"):
        target.finish()


def test_an_update_of_a_loaded_model_brings_some_tensors(caplog: pytest.LogCaptureFixture) -> None:
    """As trainers send them: what is missing stays as it is, what is unknown is refused."""
    model = Recorder()
    update = loader(model)
    update.load("model.norm.weight", torch.ones(1))
    assert update.finish(partial=True) == {"model.norm.weight"}
    assert model.finished == 1
    assert "scales for an fp8 KV cache" not in caplog.text
    unknown = loader(Recorder())
    unknown.load("model.norm.bias_of_nobody.weight", torch.ones(1))
    with pytest.raises(ValueError, match="left over"):
        unknown.finish(partial=True)
    whole = loader(Recorder())
    whole.load("model.norm.weight", torch.ones(1))
    with pytest.raises(ValueError, match="missing"):
        whole.finish()


@pytest.mark.parametrize("unread", [True, False])
def test_scales_of_an_expert_that_stays_in_the_files_wait_for_nothing(unread: bool) -> None:
    """vLLM's filter leaves weights of other ranks' experts there, and never their scales."""
    quantization = read_quantization({"quant_method": "mxfp8", "ignored_layers": []})
    config = dataclasses.replace(CONFIG, quantization=quantization)
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    rows, columns = linear_shape(config, name)
    target = loader(
        Recorder(),
        rewriter=Packer(config),
        optional=frozenset({name} if unread else ()),
    )
    scale = torch.zeros(rows, columns // 32, dtype=torch.uint8)
    assert target.take(f"{name}.weight_scale_inv", scale) == []
    if unread:
        target._require_whole_weights()
    else:
        with pytest.raises(ValueError, match=r"experts\.1\.w1"):
            target._require_whole_weights()
