"""The plan of a quantised checkpoint: what fits passes, what does not is named with its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3_plugin.checkpoint.loading import expert_share
from m3_plugin.checkpoint.names import TEXT_PREFIX, is_mtp_tensor, mtp_modules, text_modules
from m3_plugin.checkpoint.plan import (
    WeightPlan,
    index_is_alike,
    plan_checkpoint,
    require_in_proportion,
)
from m3_plugin.checkpoint.stream import Dequantiser
from m3_plugin.model.config import M3Config
from m3_plugin.model.mtp import mtp_config
from m3_plugin.quantization.dialects import is_linear
from m3_plugin.testing.quantised import (
    RECIPES,
    QuantName,
    Recipe,
    quantise_checkpoint,
    reference_checkpoint,
)
from m3_plugin.testing.random_checkpoint import write_random_checkpoint

# A host that fuses index and main projections, and one that keeps them apart.
TOGETHER = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "index_q_proj": "qkv_proj",
    "index_k_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
APART = TOGETHER | {"index_q_proj": "index_qkv_proj", "index_k_proj": "index_qkv_proj"}
ATTENTION = "language_model.model.layers.1.self_attn"
EXPERT = "language_model.model.layers.2.block_sparse_moe.experts.3.w2"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("plain") / "x", preset="small")


@pytest.fixture(scope="module")
def checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes each quantised checkpoint once."""
    written: dict[str, Path] = {}

    def write(quant: QuantName) -> Path:
        if quant not in written:
            target = tmp_path_factory.mktemp("quantised") / quant
            written[quant] = quantise_checkpoint(plain, target, quant)
        return written[quant]

    return write


def read_config(folder: Path) -> M3Config:
    return M3Config.from_hf(json.loads((folder / "config.json").read_text()))


def plan(folder: Path, *, fused: dict[str, str] = APART, dequantise: bool = False) -> WeightPlan:
    return plan_checkpoint(
        folder, read_config(folder), fused=fused, dequantise=dequantise, item_bytes=4
    )


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """Copies a checkpoint, replaces or removes (None) tensors, and changes its config."""

    def copy(
        source: Path,
        changes: dict[str, Tensor | None] | None = None,
        *,
        quantization: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(source, folder)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as shard:
                touched = set(shard.keys()) & set(changes or {})
            if touched:
                tensors = load_file(file) | {name: (changes or {})[name] for name in touched}
                kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
                save_file(kept, file, metadata={"format": "pt"})
        if quantization is not None:
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = quantization
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


@pytest.mark.parametrize("quant", RECIPES)
def test_every_recipe_is_planned(checkpoint: Callable[..., Path], quant: QuantName) -> None:
    folder = checkpoint(quant)
    found = plan(folder)
    by_module = {weight.module: weight for weight in found.weights}
    assert by_module.keys() == text_modules(read_config(folder))
    for module, weight in by_module.items():
        wanted = RECIPES[quant].format_of(module)
        assert weight.weight.name == ("plain" if wanted is None else wanted.name)
    text = sum(t.nbytes for n, t in all_tensors(folder).items() if n.startswith(TEXT_PREFIX))
    assert found.stored_bytes == found.planned_bytes == text
    assert by_module["model.layers.1.self_attn.index_q_proj"].layer.endswith(".index_qkv_proj")
    assert by_module["model.layers.1.self_attn.q_proj"].layer.endswith(".qkv_proj")


@pytest.mark.parametrize("quant", RECIPES)
def test_dequantised_bytes_are_those_of_the_plain_checkpoint(
    checkpoint: Callable[..., Path], plain: Path, quant: QuantName
) -> None:
    found = plan(checkpoint(quant), fused=TOGETHER, dequantise=True)
    assert found.planned_bytes == plan(plain, fused=TOGETHER).stored_bytes
    assert found.planned_bytes > found.stored_bytes
    assert "dequantised to" in found.describe()
    assert "none, unit scale" in found.describe()


def test_index_kept_apart_where_it_is_stored_otherwise(checkpoint: Callable[..., Path]) -> None:
    said = r"self_attn\..* in model-.* is stored as .* in model-.*fuses both.*qkv_proj"
    with pytest.raises(ValueError, match=said):
        plan(checkpoint("awq"), fused=TOGETHER)
    plan(checkpoint("awq"), fused=APART)
    plan(checkpoint("mxfp8"), fused=TOGETHER)


@pytest.mark.parametrize(
    ("kept", "layer"),
    [
        ("model.layers.2.self_attn.v_proj", r"self_attn\.qkv_proj"),
        ("model.layers.0.mlp.up_proj", r"mlp\.gate_up_proj"),
        ("model.layers.2.block_sparse_moe.experts.3.w2", "experts"),
    ],
)
def test_mixed_methods_in_one_fused_layer(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, layer: str
) -> None:
    """One weight of it left unquantised, in the files and in config.json."""
    format_of = Recipe.format_of
    monkeypatch.setattr(
        Recipe, "format_of", lambda self, m: None if m == kept else format_of(self, m)
    )
    folder = quantise_checkpoint(plain, tmp_path / "mixed", "mxfp8")
    said = rf" in model-.* in model-.*fuses both into model\.layers\..*{layer}, which has one"
    with pytest.raises(ValueError, match=said) as error:
        plan(folder)
    assert f"{kept} in model-" in str(error.value)
    plan(folder, dequantise=True)


def test_a_missing_shard(checkpoint: Callable[..., Path], damaged: Callable[..., Path]) -> None:
    folder = damaged(checkpoint("mxfp8"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards missing.*model-00002-of-00003"):
        plan(folder)


def test_a_file_with_more_behind_its_tensors(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path]
) -> None:
    """As of a download that was taken up at the wrong place."""
    folder = damaged(checkpoint("mxfp8"))
    with (folder / "model-00003-of-00003.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ValueError, match=r"model-00003.*bytes where its header promises"):
        plan(folder)


def test_a_file_cut_short(checkpoint: Callable[..., Path], damaged: Callable[..., Path]) -> None:
    folder = damaged(checkpoint("mxfp8"))
    file = folder / "model-00003-of-00003.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model-00003.*bytes where its header promises"):
        plan(folder)
    with file.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(ValueError, match=r"model-00003.*ends within its header"):
        plan(folder)


def test_no_header_and_no_weights(tmp_path: Path, plain: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no safetensors files"):
        plan(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + b"\x00" * 7 + b"not json")
    with pytest.raises(ValueError, match=r"model\.safetensors has no readable header"):
        plan(tmp_path)


def test_a_tensor_stored_twice(plain: Path, damaged: Callable[..., Path]) -> None:
    folder = damaged(plain)
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "copy.safetensors")
    with pytest.raises(ValueError, match=r"stored twice, in copy\.safetensors and in model-00001"):
        plan(folder)


def test_a_missing_weight_is_named_with_its_file(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path]
) -> None:
    parts = {f"{EXPERT}.weight": None, f"{EXPERT}.weight_scale_inv": None}
    module = EXPERT.removeprefix(TEXT_PREFIX)
    with pytest.raises(
        ValueError, match=rf"missing 1 tensor\(s\): {module}.*{EXPERT}\.weight should be in model-"
    ):
        plan(damaged(checkpoint("mxfp8"), parts))


@pytest.mark.parametrize(
    ("quant", "suffix"),
    [
        ("mxfp8", "weight_scale_inv"),
        ("nvfp4", "weight_scale_2"),
        ("mxfp4", "weight_scale"),
        ("awq", "weight_zero_point"),
        ("gptq", "g_idx"),
    ],
)
def test_an_absent_scale(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path], quant: QuantName, suffix: str
) -> None:
    folder = damaged(checkpoint(quant), {f"{EXPERT}.{suffix}": None})
    said = rf"lacks .*experts\.3\.w2\.{suffix}, without which .* in model-0000.-of-00003"
    with pytest.raises(ValueError, match=said):
        plan(folder)


def test_a_scale_of_the_wrong_shape(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path]
) -> None:
    scale = torch.full((64, 1), 127, dtype=torch.uint8)
    folder = damaged(checkpoint("mxfp8"), {f"{EXPERT}.weight_scale_inv": scale})
    with pytest.raises(
        ValueError,
        match=rf"{EXPERT}\.weight_scale_inv in model-.* must have shape \[64, 2\].*\[64, 1\]",
    ):
        plan(folder)


def test_a_weight_that_is_not_quantised_after_all(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path]
) -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    folder = damaged(checkpoint("mxfp8"), {f"{EXPERT}.weight": weight})
    with pytest.raises(ValueError, match=rf"{EXPERT}\.weight in model-.*F8_E4M3.*got BF16"):
        plan(folder)


@pytest.mark.parametrize("dequantise", [False, True])
def test_a_quantised_index_branch_which_the_config_keeps(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path], dequantise: bool
) -> None:
    """The failure that shows on long prompts only: refused by name, on every path."""
    config = json.loads((checkpoint("mxfp8") / "config.json").read_text())["quantization_config"]
    config["ignored_layers"].append("re:.*index_[qk]_proj")
    folder = damaged(checkpoint("mxfp8"), quantization=config)
    with pytest.raises(
        ValueError,
        match=r"self_attn\.index_._proj\.weight.* in model-.*F8_E4M3.*keeps.*wrong blocks",
    ):
        plan(folder, dequantise=dequantise)


def test_quantised_files_without_a_word_in_the_config(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path]
) -> None:
    folder = damaged(checkpoint("mxfp8"), quantization={})
    with pytest.raises(ValueError, match=r"stored as F8_E4M3, but config\.json has no quantiz"):
        plan(folder)


def test_scales_of_the_cache_are_counted_and_are_no_part_of_a_weight(
    checkpoint: Callable[..., Path], damaged: Callable[..., Path]
) -> None:
    folder = damaged(checkpoint("nvfp4"))
    scales = {
        f"{ATTENTION}.k_proj.k_scale": torch.tensor(0.5),
        f"{ATTENTION}.v_proj.v_scale": torch.tensor([2.0]),
        f"{ATTENTION}.q_scale": torch.ones(16),
    }
    save_file(scales, folder / "scales.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    found = plan(folder)
    assert set(found.cache_scales) == set(list(scales)[:2])
    assert found.describe().endswith("scales for an fp8 KV cache: 2")
    assert plan(checkpoint("nvfp4")).describe().endswith("fp8 KV cache: none, unit scale")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"k_scale": torch.ones(3)}, r"k_scale in scales\.safetensors must hold one .* \[3\]"),
        ({"v_proj.v_scale": torch.ones(1).int()}, r"v_proj\.v_scale in scales.* F32; got I32"),
        ({"k_scale": torch.ones(1)}, r"k scale .*k_scale in scales\.safet.* without its v scale"),
    ],
)
def test_wrong_scales_of_the_cache(
    checkpoint: Callable[..., Path],
    damaged: Callable[..., Path],
    scales: dict[str, Tensor],
    message: str,
) -> None:
    folder = damaged(checkpoint("w4a16"))
    tensors = {f"{ATTENTION}.{name}": tensor for name, tensor in scales.items()}
    save_file(tensors, folder / "scales.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=message):
        plan(folder)


def test_a_host_that_allocates_16_bits_for_stored_4_is_stopped(
    checkpoint: Callable[..., Path],
) -> None:
    found = plan(checkpoint("nvfp4"))
    layer = "model.layers.1.block_sparse_moe.experts"
    stored = sum(weight.stored_bytes for weight in found.weights if weight.layer == layer)
    require_in_proportion(found, {layer: stored})
    require_in_proportion(found, {layer: stored // 4}, share=0.25)
    with pytest.raises(ValueError, match=rf"{layer} takes .*nvfp4.*at most 1\.3.*DEQUANTIZE"):
        require_in_proportion(found, {layer: stored * 3})
    with pytest.raises(ValueError, match="did not recognise"):
        require_in_proportion(found, {layer: stored}, share=0.25)


@pytest.mark.parametrize("quant", RECIPES)
def test_dequantised_on_the_way_whatever_the_order(
    checkpoint: Callable[..., Path],
    plain: Path,
    tmp_path: Path,
    quant: QuantName,
) -> None:
    """The reference was written before packing; every tensor of it must come out, once."""
    folder = checkpoint(quant)
    reference = all_tensors(reference_checkpoint(plain, tmp_path / "reference", quant))
    stored = list(all_tensors(folder).items())
    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(1)).tolist()
    dequantiser = Dequantiser(read_config(folder))
    found = {}
    for name, tensor in (stored[i] for i in order):
        plain_tensor = dequantiser.take(name.removeprefix(TEXT_PREFIX), tensor)
        if plain_tensor is not None:
            assert plain_tensor[0] not in found
            found[plain_tensor[0]] = plain_tensor[1]
    dequantiser.require_complete()
    assert dequantiser.waiting == {}
    assert found.keys() == {name.removeprefix(TEXT_PREFIX) for name in reference}
    for name, tensor in reference.items():
        torch.testing.assert_close(
            found[name.removeprefix(TEXT_PREFIX)].float(), tensor, rtol=3e-7, atol=0
        )


def test_a_part_that_never_comes_is_named_while_loading(checkpoint: Callable[..., Path]) -> None:
    dequantiser = Dequantiser(read_config(checkpoint("mxfp8")))
    name = EXPERT.removeprefix(TEXT_PREFIX)
    assert dequantiser.take(f"{name}.weight", torch.zeros(64, 64).to(torch.float8_e4m3fn)) is None
    with pytest.raises(ValueError, match=rf"lacks {name}\.weight_scale_inv"):
        dequantiser.require_complete()
    with pytest.raises(ValueError, match=rf"{name}\.weight_scale_inv must have shape"):
        dequantiser.take(f"{name}.weight_scale_inv", torch.zeros(64, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"{name}\.weight_packed is no part of a weight"):
        dequantiser.take(f"{name}.weight_packed", torch.zeros(256, 2, dtype=torch.uint8))


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "plain"
    return write_random_checkpoint(folder, preset="small", num_mtp_modules=2)


class TestDraft:
    """MTP modules, quantised like the target or left alone; no published checkpoint holds any."""

    @staticmethod
    def draft_config(folder: Path, *, num_modules: int = 2) -> M3Config:
        config = json.loads((folder / "config.json").read_text())
        return mtp_config(config, num_modules=num_modules)

    def plan(self, folder: Path, *, num_modules: int = 2, dequantise: bool = False) -> WeightPlan:
        config = self.draft_config(folder, num_modules=num_modules)
        return plan_checkpoint(
            folder, config, fused=APART, dequantise=dequantise, item_bytes=4, draft=True
        )

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("quant", RECIPES)
    def test_it_is_planned_as_it_is_stored(
        self, with_mtp: Path, tmp_path: Path, quant: QuantName, keep: bool
    ) -> None:
        """And its tensors come out of a stream as the numbers noted before they were packed."""
        folder = quantise_checkpoint(with_mtp, tmp_path / "q", quant, keep_drafts=keep)
        found = self.plan(folder)
        config = self.draft_config(folder)
        formats = {weight.module: weight.weight.name for weight in found.weights}
        assert formats.keys() == mtp_modules(config, num_modules=2)
        for module, name in formats.items():
            wanted = None if keep else RECIPES[quant].format_of(module)
            assert name == ("plain" if wanted is None else wanted.name)
        assert (len(set(formats.values())) > 1) is not keep
        stored = {n: t for n, t in all_tensors(folder).items() if is_mtp_tensor(n)}
        assert found.stored_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert not any(is_mtp_tensor(weight.module) for weight in plan(folder).weights)

        meant = all_tensors(
            with_mtp if keep else reference_checkpoint(with_mtp, tmp_path / "meant", quant)
        )
        dequantiser = Dequantiser(config)
        for name, tensor in stored.items():
            plain = dequantiser.take(name.removeprefix(TEXT_PREFIX), tensor)
            if plain is not None:
                expected = meant[TEXT_PREFIX + plain[0]]
                torch.testing.assert_close(plain[1].float(), expected.float(), rtol=3e-7, atol=0)
        dequantiser.require_complete()

    def test_dequantised_bytes_are_those_of_the_plain_module(
        self, with_mtp: Path, tmp_path: Path
    ) -> None:
        folder = quantise_checkpoint(with_mtp, tmp_path / "q", "mxfp8")
        assert is_linear("model.mtp.layers.0.eh_proj")
        one, both = (self.plan(folder, num_modules=n, dequantise=True) for n in (1, 2))
        assert both.planned_bytes == 2 * one.planned_bytes == self.plan(with_mtp).stored_bytes

    def test_an_absent_scale_of_a_module(
        self, with_mtp: Path, tmp_path: Path, damaged: Callable[..., Path]
    ) -> None:
        """The target alone does not load it and does not mind."""
        name = "language_model.model.mtp.layers.1.eh_proj.weight_scale_inv"
        folder = damaged(quantise_checkpoint(with_mtp, tmp_path / "q", "mxfp8"), {name: None})
        with pytest.raises(ValueError, match=r"lacks model\.mtp\.layers\.1\.eh_proj\.weight_scale"):
            self.plan(folder)
        self.plan(folder, num_modules=1)
        plan(folder)

    def test_a_module_quantised_that_the_config_keeps(
        self, with_mtp: Path, tmp_path: Path, damaged: Callable[..., Path]
    ) -> None:
        folder = quantise_checkpoint(with_mtp, tmp_path / "q", "mxfp8")
        kept = quantise_checkpoint(with_mtp, tmp_path / "kept", "mxfp8", keep_drafts=True)
        config = json.loads((kept / "config.json").read_text())["quantization_config"]
        with pytest.raises(ValueError, match=r"mtp\.layers\..* stored as F8_E4M3, .*keeps"):
            self.plan(damaged(folder, quantization=config))

    def test_its_index_branch_is_apart_only_where_it_is_stored_otherwise(
        self, with_mtp: Path, tmp_path: Path
    ) -> None:
        """An awq target keeps its index branch apart, an unquantised module beside it does not."""
        for keep, apart in ((True, False), (False, True)):
            folder = tmp_path / f"keep-{keep}"
            quantise_checkpoint(with_mtp, folder, "awq", keep_drafts=keep)
            config = self.draft_config(folder)
            assert index_is_alike(config, dequantise=False, draft=True) is not apart
            assert index_is_alike(config, dequantise=True, draft=True)
            assert not index_is_alike(read_config(folder), dequantise=False)


@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_experts_that_a_host_rounds_up_to_whole_tiles_are_let_through(
    checkpoint: Callable[..., Path], ranks: int
) -> None:
    """192 channels of the released model's experts on 16 ranks become 256."""
    found = plan(checkpoint("nvfp4"))
    layer = "model.layers.1.block_sparse_moe.experts"
    planned = sum(weight.planned_bytes for weight in found.weights if weight.layer == layer)
    channels = 3072 // ranks
    allocated = planned * (-(-channels // 128) * 128) // 3072
    share = expert_share(3072, ranks=ranks)
    require_in_proportion(found, {layer: allocated}, share=share)
    with pytest.raises(ValueError, match="did not recognise"):
        require_in_proportion(found, {layer: 2 * allocated}, share=share)
