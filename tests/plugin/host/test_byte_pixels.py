"""Pixels that travel as bytes are the numbers that transformers makes, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.minimax_m3_vl.image_processing_minimax_m3_vl import (
    MiniMaxM3VLImageProcessor,
)
from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
    MiniMaxM3VLVideoProcessor,
)

from m3_plugin.host.side_caps import as_served
from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.resizing import SideCaps
from m3_plugin.model.vision import M3Vision, VisionConfig

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
)
RULES = (None, SideCaps(height=84, width=112))


def prepared(processor: Any, media: list[Any], kind: str, **options: Any) -> torch.Tensor:
    name = "pixel_values" if kind == "images" else "pixel_values_videos"
    part = processor.image_processor if kind == "images" else processor.video_processor
    if kind == "videos":
        options = {"do_resize": True, **options}
    return part(media, return_tensors="pt", **options)[name]


def transformers_processor(**settings: Any) -> Any:
    # without a tokenizer, which pixels do not need
    processor: Any = object.__new__(MiniMaxM3VLProcessor)
    processor.image_processor = MiniMaxM3VLImageProcessor(**settings)
    processor.video_processor = MiniMaxM3VLVideoProcessor(**settings)
    return processor


def media_of(kind: str) -> list[Any]:
    """Three items, of which two have one shape, with every byte among them."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((75, 100), (75, 100), (200, 130))
    noise = [
        torch.randint(0, 256, (n, 3, *shape), dtype=torch.uint8, generator=generator)
        for n, shape in zip((3, 2, 5), shapes, strict=True)
    ]
    if kind == "videos":
        return noise
    return [Image.fromarray(frames[0].permute(1, 2, 0).numpy()) for frames in noise]


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize("rule", RULES, ids=["area", "sides"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["clip", "other", "signed"])
def test_bytes_become_what_transformers_makes(
    settings: dict[str, Any], rule: SideCaps | None, kind: str
) -> None:
    processor = transformers_processor(**settings)
    scale = PixelScale.read(settings)
    assert scale is not None
    served = as_served(processor, rule=rule, scale=scale)
    found = prepared(served, media_of(kind), kind)
    assert found.dtype == torch.uint8
    floats = prepared(as_served(processor, rule=rule, scale=None), media_of(kind), kind)
    assert floats.dtype == torch.float32
    assert torch.equal(scale.normalised(found), floats)
    if rule is None:
        assert torch.equal(floats, prepared(processor, media_of(kind), kind))


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [0.1, 0.1, 0.1]},
        {"image_std": [0.1, 0.1, 0.1]},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 0.5},
        {"do_rescale": False, "do_normalize": False},
    ],
    ids=" ".join,
)
def test_other_settings_of_a_call_are_met(options: dict[str, Any], kind: str) -> None:
    processor = transformers_processor()
    served = as_served(processor, rule=None, scale=PixelScale.read({}))
    found = prepared(served, media_of(kind), kind, **options)
    expected = prepared(processor, media_of(kind), kind, **options)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize("rule", RULES, ids=["area", "sides"])
@pytest.mark.parametrize("floats", [(0, 1, 2), (1,)], ids=["all", "one of them"])
def test_media_in_floats_stay_floats(
    floats: tuple[int, ...], rule: SideCaps | None, kind: str
) -> None:
    """What comes beside them too: one tensor holds all."""
    processor = transformers_processor()
    media = media_of("videos")
    media = [
        # shapes differ, for transformers stacks what has one shape
        item[: 3 - at, ..., at * 28 :].float() if at in floats else item
        for at, item in enumerate(media)
    ]
    if kind == "images":
        media = [frames[0] for frames in media]
    found, expected = (
        prepared(as_served(processor, rule=rule, scale=scale), media, kind)
        for scale in (PixelScale.read({}), None)
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": "1/255"},
        {"rescale_factor": -1.0},
        {"image_mean": 0.5},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_std": [[], 0.0, 0.5]},
    ],
)
def test_what_is_no_scale_is_none(said: Any) -> None:
    assert PixelScale.read(said) is None


def tower(scale: PixelScale | None) -> M3Vision:
    config = VisionConfig(
        hidden_size=80,
        intermediate_size=32,
        num_layers=1,
        num_heads=1,
        text_hidden_size=24,
        projector_hidden_size=16,
    )
    torch.manual_seed(0)
    return M3Vision(config, scale=scale, max_patches=40).requires_grad_(False)


def test_the_tower_reads_bytes_as_what_they_become() -> None:
    """In several passes through its layers, of which each normalises its own patches."""
    scale = PixelScale.read({})
    assert scale is not None
    patches = torch.randint(0, 256, (112, 1176), dtype=torch.uint8)
    grids = [(1, 4, 6), (4, 2, 4), (7, 2, 4)]
    for dtype in (torch.float32, torch.bfloat16):
        model = tower(scale).to(dtype)
        assert torch.equal(model(patches, grids), model(scale.normalised(patches), grids))
    with pytest.raises(ValueError, match=r"pixel_values must be normalised.*torch\.uint8"):
        tower(None)(patches, grids)
