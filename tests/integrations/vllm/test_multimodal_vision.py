"""The vision tower against transformers' own, on a random checkpoint in the published layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m3_plugin.model.vision import CHECKPOINT_PREFIXES, M3Vision, VisionConfig, split_segments
from m3_plugin.testing.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.vllm

Grids = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("vision") / "m3", preset="small")


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> VisionConfig:
    return VisionConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))


def _vision_tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model that holds the tower as `vision_tower` is asked to load."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.startswith("language_model."):
                continue
            for old, new in CHECKPOINT_PREFIXES.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
            yield name, tensor


def _build(checkpoint: Path, config: VisionConfig, **options: Any) -> M3Vision:
    holder = nn.Module()
    holder.vision_tower = M3Vision(config, **options)
    holder.load_state_dict(dict(_vision_tensors(checkpoint)), strict=True)
    return holder.vision_tower.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tower(checkpoint: Path, config: VisionConfig) -> M3Vision:
    return _build(checkpoint, config)


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    from transformers import MiniMaxM3SparseForConditionalGeneration

    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    # transformers 5.17 rotates over height and width only. Rightly, 80 channels have 13
    # frequencies for each of time, height and width.
    frequencies = getattr(model.model.vision_tower.rotary_emb, "inv_freq", None)
    if frequencies is not None and frequencies.numel() != 13:
        pytest.skip("the vision tower of this transformers is no reference")
    return model.eval().requires_grad_(False)


def _pixels(grids: Grids, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 14 * 14, generator=generator)


def _reference_features(model, pixels: torch.Tensor, grids: Grids) -> torch.Tensor:
    """One call per grid, because transformers lets the grids of a call see each other."""
    features = []
    for rows, grid in zip(pixels.split([t * h * w for t, h, w in grids]), grids, strict=True):
        call = model.model.get_image_features if grid[0] == 1 else model.model.get_video_features
        output = call(rows, torch.tensor([grid])).pooler_output
        # A tensor per item, or all of them in one up to transformers 5.17.
        features += [output] if isinstance(output, torch.Tensor) else output
    return torch.cat(features)


@pytest.mark.parametrize(
    "grids",
    [
        pytest.param([(1, 2, 2)], id="smallest"),
        pytest.param([(1, 8, 10)], id="image"),
        pytest.param([(1, 36, 64)], id="1920x1080"),
        pytest.param([(4, 8, 10)], id="video-one-segment"),
        pytest.param([(1, 8, 10), (1, 2, 142), (1, 8, 10), (1, 8, 10)], id="images"),
        pytest.param([(1, 4, 4), (3, 8, 6), (1, 4, 4)], id="mixed"),
    ],
)
def test_features_equal_transformers(tower: M3Vision, reference, grids: Grids) -> None:
    pixels = _pixels(grids)
    features = tower(pixels, torch.tensor(grids))
    expected = _reference_features(reference, pixels, grids)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "segments"),
    [
        ((5, 8, 10), [(4, 8, 10), (1, 8, 10)]),
        ((6, 8, 10), [(4, 8, 10), (2, 8, 10)]),
        ((8, 4, 4), [(4, 4, 4), (4, 4, 4)]),
        ((13, 2, 6), [(4, 2, 6), (4, 2, 6), (4, 2, 6), (1, 2, 6)]),
    ],
)
def test_long_videos_are_cut_into_segments(
    tower: M3Vision, reference, grid: tuple[int, int, int], segments: Grids
) -> None:
    assert split_segments([grid], segment_patches=4) == segments
    pixels = _pixels([grid])
    features = tower(pixels, [grid])
    expected = _reference_features(reference, pixels, segments)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    # Uncut, the same video has visibly other features, so the comparison above can tell.
    uncut = _reference_features(reference, pixels, [grid])
    assert (uncut - expected).abs().max() > 0.05 * expected.std()


def test_neither_neighbours_nor_the_size_of_a_pass_change_features(
    tower: M3Vision, checkpoint: Path, config: VisionConfig
) -> None:
    grids = [(1, 4, 6), (6, 8, 10), (1, 4, 6), (2, 2, 2)]
    pixels = _pixels(grids)
    together = tower(pixels, grids)
    counts = [t * h * w for t, h, w in grids]
    alone = [tower(x, [grid]) for x, grid in zip(pixels.split(counts), grids, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    # A bound below the largest segment means one segment per pass.
    small_passes = _build(checkpoint, config, max_patches=100)
    torch.testing.assert_close(together, small_passes(pixels, grids), rtol=1e-5, atol=1e-6)


def test_bf16_is_as_close_to_fp32_as_transformers(
    checkpoint: Path, config: VisionConfig, tower: M3Vision, reference
) -> None:
    from transformers import MiniMaxM3SparseForConditionalGeneration

    # 60 patches wide: positions at which a rotation in bf16 has lost its last digits.
    grids = [(4, 4, 60)]
    pixels = _pixels(grids).bfloat16()
    expected = _reference_features(reference, pixels.float(), grids)
    low = MiniMaxM3SparseForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    baseline = _reference_features(low.eval().requires_grad_(False), pixels, grids)
    features = _build(checkpoint, config).bfloat16()(pixels, grids)
    assert features.dtype == torch.bfloat16

    def error(x: torch.Tensor) -> float:
        return (x.float() - expected).pow(2).mean().sqrt().item()

    assert error(features) <= 1.1 * error(baseline)
    assert error(features) < 0.02 * expected.std()


def test_rotation_is_applied_in_fp32(config: VisionConfig) -> None:
    from m3_plugin.model.vision import _rotate

    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(200, 1, config.head_dim // 6 * 3, generator=generator) * 200
    x = torch.randn(200, config.num_heads, config.head_dim, generator=generator).bfloat16()
    exact = _rotate(x.double(), angles.cos(), angles.sin())
    rounded = _rotate(x, angles.cos(), angles.sin())
    assert rounded.dtype == torch.bfloat16
    # Half a unit in the last of bf16's eight bits, and nothing on top of it.
    torch.testing.assert_close(rounded.double(), exact, rtol=2.0**-8, atol=2.0**-20)


def test_pixel_dtype_follows_the_weights(tower: M3Vision) -> None:
    grids = [(1, 4, 4)]
    pixels = _pixels(grids).bfloat16()
    torch.testing.assert_close(tower(pixels, grids), tower(pixels.float(), grids), rtol=0, atol=0)


def test_nothing_in_nothing_out(tower: M3Vision, config: VisionConfig) -> None:
    assert tower(_pixels([]), []).shape == (0, config.text_hidden_size)


@pytest.mark.parametrize(
    ("shape", "grids", "message"),
    [
        ((16, 1176), [(1, 4, 6)], "counts 24 patches; pixel_values has 16 rows"),
        ((12, 1176), [(1, 3, 4)], "multiples of 2"),
        ((16, 588), [(1, 4, 4)], r"\[patches, 1176\]; got \[16, 588\]"),
        ((0, 1176), [(0, 4, 4)], "grid_thw must hold"),
    ],
)
def test_inconsistent_inputs_are_refused(
    tower: M3Vision, shape: tuple[int, int], grids: Grids, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tower(torch.zeros(shape), grids)


def test_every_form_of_the_config_reads_alike(checkpoint: Path, config: VisionConfig) -> None:
    from transformers import AutoConfig
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
    from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3Config

    raw = json.loads((checkpoint / "config.json").read_text())
    assert config.segment_patches == 4
    assert VisionConfig.from_hf(MiniMaxM3Config(**raw)) == config
    for theirs in (AutoConfig.from_pretrained(checkpoint), MiniMaxM3VLConfig.from_dict(raw)):
        assert VisionConfig.from_hf(theirs) == config


@pytest.mark.parametrize("part", ["vision_config", "top"])
def test_another_activation_is_refused(checkpoint: Path, part: str) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    if part == "top":
        raw["projector_hidden_act"] = "silu"
    else:
        raw["vision_config"]["hidden_act"] = "quick_gelu"
    with pytest.raises(ValueError, match="must be 'gelu'; got"):
        VisionConfig.from_hf(raw)
