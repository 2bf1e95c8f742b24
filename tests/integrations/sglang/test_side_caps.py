"""MiniMax-M3.1's pictures and videos in SGLang: sizes and pixels by its own rule."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from tests.integrations.pixels import normalised
from tests.integrations.sglang.media_processor import build, prepare
from tests.integrations.side_caps import ATOL, SIZES, noise, patches

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m31") / "plain"
    return write_random_checkpoint(folder, preset=M31_PRESETS["engine"])


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return build(checkpoint)


@pytest.mark.parametrize(("size", "grid"), SIZES.items())
def test_images(processor: Any, size: tuple[int, int], grid: tuple[int, int]) -> None:
    pixels = noise(*size)
    output = prepare(processor, IMAGE, image=[Image.fromarray(pixels)])
    (item,) = output.mm_items
    expected, whole = patches([pixels])
    assert whole == (1, *grid)
    assert tuple(item.image_grid_thw[0].tolist()) == whole
    assert len(output.input_ids) == grid[0] * grid[1] // 4 + 2
    torch.testing.assert_close(
        normalised(item.feature), torch.from_numpy(expected), atol=ATOL, rtol=0
    )


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 60, 90), (5, 700, 300)])
def test_videos(processor: Any, frames: int, height: int, width: int) -> None:
    video = np.stack([noise(height, width, seed=i) for i in range(frames)])
    output = prepare(processor, VIDEO, video=[torch.from_numpy(video).permute(0, 3, 1, 2)])
    (item,) = output.mm_items
    expected, grid = patches(list(video))
    assert tuple(item.video_grid_thw[0].tolist()) == grid
    torch.testing.assert_close(
        normalised(item.feature), torch.from_numpy(expected), atol=ATOL, rtol=0
    )


def test_sglang_s_own_processor_gives_the_same(processor: Any, checkpoint: Path) -> None:
    """0.5.23 reads every MiniMax-M3 by this rule; older ones have it for none."""
    from sglang.srt.utils.hf_transformers_utils import get_processor

    own: Any = get_processor(str(checkpoint)).image_processor
    if type(own).__name__ != "MiniMaxM31ImageProcessor":
        pytest.skip(f"this SGLang reads pictures with {type(own).__name__}")
    for size in SIZES:
        image = Image.fromarray(noise(*size))
        theirs = own(images=[image], return_tensors="pt")
        (item,) = prepare(processor, IMAGE, image=[image]).mm_items
        assert torch.equal(normalised(item.feature), theirs["pixel_values"])
        assert item.image_grid_thw.tolist() == theirs["image_grid_thw"].tolist()


def test_bounds_of_an_area_are_refused(checkpoint: Path) -> None:
    wishes = {"image": {"max_pixels": 99}}
    with pytest.raises(ValueError, match="in --mm-process-config bounds a picture's area"):
        build(checkpoint, mm_process_config=wishes)


def test_an_unknown_rule_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "m31")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": [680, 672]}))
    with pytest.raises(ValueError, match="must be the most pixels of height and width"):
        build(folder)
