"""M3.1's test checkpoints: what is published of their layout, and what their answers rest on."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from m3_plugin.checkpoint.headers import read_checkpoint
from m3_plugin.checkpoint.plan import plan_checkpoint
from m3_plugin.cli.tiny import tiny
from m3_plugin.model.config import M3Config
from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.prompts import NeedlePrompt, first_block_prompt, needle_prompt
from m3_plugin.testing.quantised import quantise_checkpoint, reference_checkpoint
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from m3_plugin.testing.vocabulary import VOCABULARY
from tests.integrations.m31_reference import Reference
from tests.plugin.cli.schemas import checked


@pytest.mark.parametrize(
    ("preset", "tensors", "size"), [("small", 295, 5_151_680), ("kernel", 393, 47_613_600)]
)
def test_tensors_are_as_many_and_as_large_as_published(
    tmp_path: Path, preset: str, tensors: int, size: int
) -> None:
    """Worked out by hand from the published names, dtypes and shapes."""
    shape = M31_PRESETS[preset]  # type: ignore[index]
    plain = write_random_checkpoint(tmp_path / "plain", preset=shape, dtype=torch.bfloat16)
    stored = quantise_checkpoint(plain, tmp_path / "stored", "mxfp8-nvfp4")
    text = [h for h in read_checkpoint(stored) if h.name.startswith("language_model.")]
    assert (len(text), sum(header.num_bytes for header in text)) == (tensors, size)
    layers = range(shape.num_hidden_layers)
    routed = sum(map(shape.is_routed, layers))
    dense = shape.num_hidden_layers - routed
    assert len(text) == 3 + 24 * dense + (26 + 12 * shape.num_local_experts) * routed
    expert = "language_model.model.layers.2.block_sparse_moe.experts.1."
    dtypes = {h.name.removeprefix(expert): h.dtype for h in text if h.name.startswith(expert)}
    wanted = {
        "weight_packed": "U8",
        "weight_scale": "F8_E4M3",
        "weight_global_scale": "F32",
        "input_global_scale": "F32",
    }
    assert dtypes == {f"w{i}.{k}": v for i in (1, 2, 3) for k, v in wanted.items()}
    config = M3Config.from_hf(json.loads((stored / "config.json").read_text()))
    assert all(config.sparse_layers)
    assert config.moe_layers == tuple(map(shape.is_routed, layers))
    plan = plan_checkpoint(stored, config, fused={}, dequantise=False)
    assert len({weight.weight.name for weight in plan.weights}) == 3


@cache
def model(folder: Path, **changes: int) -> Reference:
    """The constructed M3.1 with one forced block, its rule changed afterwards."""
    made = ConstructedCheckpoint(topk_blocks=5, sparse_everywhere=True, num_init_blocks=1)
    found = Reference(made.write(folder / "-".join(["m31", *map(str, changes.values())])))
    found.config["sparse_attention_config"] |= changes
    return found


def first_word(found: Reference, prompt: NeedlePrompt) -> int:
    """The greedy answer's first word: one pass."""
    return found.next_tokens(list(prompt.token_ids))[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("constructed")


def test_the_answer_is_right_only_if_the_first_block_is_always_read(folder: Path) -> None:
    prompt = first_block_prompt(3, topk_blocks=5)
    assert first_word(model(folder), prompt) == prompt.expected_ids[0]
    assert first_word(model(folder, sparse_init_block=0), prompt) == VOCABULARY.nowhere_id


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, True),
        # one block too many: what is forced does not count
        ({"sparse_topk_blocks": 6}, False),
        # one more by its score
        ({"sparse_init_block": 0}, False),
        ({"sparse_init_block": 2}, False),
    ],
)
def test_forced_blocks_count_within_the_budget(
    folder: Path, changes: dict[str, int], right: bool
) -> None:
    """With decoys next in rank: a wrong number of blocks is a wrong word."""
    prompt = needle_prompt(5, num_tokens=1536)
    said = first_word(model(folder, **changes), prompt)
    assert (said == prompt.expected_ids[0]) is right


def test_the_first_layers_choose_their_blocks(tmp_path: Path) -> None:
    """What no row of layer 0 chose does not change what it makes of the last row."""
    shape = dataclasses.replace(M31_PRESETS["small"], num_hidden_layers=1, num_dense_layers=1)
    folder = write_random_checkpoint(tmp_path / "one", preset=shape)
    found = Reference(folder)
    prompt = torch.randint(40, 400, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    before = found.logits(prompt)[-1]
    unread = 0
    for block in range(300 // shape.block_size):
        changed = list(prompt)
        changed[block * shape.block_size] = 7
        unread += bool(torch.equal(found.logits(changed)[-1], before))
    assert 0 < unread < 300 // shape.block_size


@pytest.mark.parametrize("init", [0, 1, 2])
def test_the_config_says_how_many_first_blocks_are_forced(init: int, tmp_path: Path) -> None:
    shape = dataclasses.replace(M31_PRESETS["small"], num_init_blocks=init)
    folder = write_random_checkpoint(tmp_path / "m31", preset=shape)
    config = M3Config.from_hf(json.loads((folder / "config.json").read_text()))
    assert config.msa is not None
    assert config.msa.num_init_blocks == init
    # M3.1's config does not count modules that its checkpoint does not hold
    assert config.num_mtp_modules == 0


def test_w1_and_w3_of_an_expert_share_the_scale_of_the_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = write_random_checkpoint(tmp_path / "plain", preset=M31_PRESETS["small"])
    stored = quantise_checkpoint(plain, tmp_path / "stored", "mxfp8-nvfp4")
    reference_checkpoint(plain, tmp_path / "reference", "mxfp8-nvfp4")
    tensors = {k: v for file in stored.glob("*.safetensors") for k, v in load_file(file).items()}
    name = "language_model.model.layers.2.block_sparse_moe.experts.{}.{}.{}"
    for expert in range(8):
        scales = [tensors[name.format(expert, w, "weight_global_scale")] for w in ("w1", "w3")]
        assert scales[0].shape == (1,)
        assert torch.equal(*scales)
        assert tensors[name.format(expert, "w2", "input_global_scale")].tolist() == [16.0]


def test_the_command_writes_it_as_published(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(tiny)
    folder = tmp_path / "tiny"
    options = ["--model", "m3.1", "--kind", "random", "--preset", "small", "--init", "1", "--json"]
    result = CliRunner().invoke(app, [str(folder), *options])
    assert result.exit_code == 0, result.output
    summary = checked("tiny", result.stdout)
    assert (summary["model"], summary["quant"], summary["init_blocks"]) == (
        "m3.1",
        "mxfp8-nvfp4",
        1,
    )
    assert summary["sparse_layers"] == summary["layers"] == 4
    config = M3Config.from_hf(json.loads((folder / "config.json").read_text()))
    assert config.quantization is not None
    assert config.quantization.has_own_experts
    assert config.msa is not None
    assert config.msa.num_init_blocks == 1
