"""MiniMax-M3.1's pictures and videos in vLLM: sizes and pixels by its own rule."""

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
from tests.integrations.side_caps import ATOL, SIZES, noise, patches

pytestmark = pytest.mark.vllm

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["


def build(checkpoint: Path) -> Any:
    """Our processor on a checkpoint's files, as vLLM builds it."""
    from vllm.config import ModelConfig
    from vllm.multimodal.processing.context import InputProcessingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from m3_vllm.media import M3DummyInputsBuilder, M3MultiModalProcessor, M3ProcessingInfo

    config = ModelConfig(model=str(checkpoint), dtype="float32", max_model_len=8192)
    tokenizer = cached_tokenizer_from_config(config)
    info = M3ProcessingInfo(InputProcessingContext(config, tokenizer))
    return M3MultiModalProcessor(info, M3DummyInputsBuilder(info))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m31") / "plain"
    return write_random_checkpoint(folder, preset=M31_PRESETS["engine"])


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return build(checkpoint)


def process(processor: Any, text: str, data: Any, **kwargs: Any) -> Any:
    prompt = processor.info.get_tokenizer().encode(text)
    items = processor.info.parse_mm_data(data)
    return processor(prompt, items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize(("size", "grid"), SIZES.items())
def test_images(processor: Any, size: tuple[int, int], grid: tuple[int, int]) -> None:
    pixels = noise(*size)
    result = process(processor, IMAGE, {"image": Image.fromarray(pixels)})
    (item,) = result["mm_kwargs"]["image"]
    expected, whole = patches([pixels])
    assert whole == (1, *grid)
    assert tuple(item["image_grid_thw"].data.tolist()) == whole
    assert len(result["prompt_token_ids"]) == grid[0] * grid[1] // 4 + 2
    torch.testing.assert_close(
        normalised(item["pixel_bytes"].data), torch.from_numpy(expected), atol=ATOL, rtol=0
    )


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 60, 90), (5, 700, 300)])
def test_videos(processor: Any, frames: int, height: int, width: int) -> None:
    video = np.stack([noise(height, width, seed=i) for i in range(frames)])
    result = process(processor, VIDEO, {"video": [video]})
    (item,) = result["mm_kwargs"]["video"]
    expected, grid = patches(list(video))
    assert tuple(item["video_grid_thw"].data.tolist()) == grid
    torch.testing.assert_close(
        normalised(item["pixel_bytes_videos"].data), torch.from_numpy(expected), atol=ATOL, rtol=0
    )


def test_bounds_are_reached_and_never_passed(processor: Any) -> None:
    """What vLLM reserves: the largest picture has as many tokens, and no other has more."""
    info = processor.info
    image, video = info.image_geometry(), info.video_geometry()
    assert image.max_tokens == video.max_tokens == 576
    assert (image.largest.width, image.largest.height) == (672, 672)
    dummy = processor.dummy_inputs.get_dummy_mm_data(8192, {"image": 1, "video": 0}, {})
    result = process(processor, IMAGE, {"image": dummy["image"]})
    assert len(result["prompt_token_ids"]) == 576 + 2


def test_frames_shrunk_while_they_are_decoded_are_the_same(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m3_vllm import media

    assert processor.info.rule == media.M3VideoLoader.caps is not None
    frame = noise(800, 1000)

    class Stream:
        """OpenCV's capture of one frame."""

        def get(self, key: int) -> float:
            import cv2

            return {cv2.CAP_PROP_FRAME_HEIGHT: 800, cv2.CAP_PROP_FRAME_WIDTH: 1000}[key]

        def grab(self) -> bool:
            return True

        def retrieve(self, memory: np.ndarray | None) -> tuple[bool, np.ndarray]:
            return True, np.ascontiguousarray(frame[..., ::-1])

    monkeypatch.setattr(media, "_MAX_HELD_PIXELS", 1)
    frames, _ = media.M3VideoLoader.read_frames(Stream(), [0, 1], 2)
    assert frames.shape == (2, 560, 672, 3)
    result = process(processor, VIDEO, {"video": [frames]})
    expected, _ = patches([frame, frame])
    torch.testing.assert_close(
        normalised(result["mm_kwargs"]["video"][0]["pixel_bytes_videos"].data),
        torch.from_numpy(expected),
        atol=ATOL,
        rtol=0,
    )


@pytest.mark.parametrize(
    "wish", [{"max_pixels": 99}, {"images_kwargs": {"size": {"longest_edge": 9}}}]
)
def test_bounds_of_an_area_are_refused(processor: Any, wish: dict[str, Any]) -> None:
    image = Image.fromarray(noise(60, 90))
    with pytest.raises(ValueError, match="in mm_processor_kwargs bounds a picture's area"):
        process(processor, IMAGE, {"image": image}, **wish)


def test_an_unknown_rule_is_refused_where_pictures_are_wanted(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Text is served: the rule is none of its business."""
    folder = shutil.copytree(checkpoint, tmp_path / "m31")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"longest_edge": 9}}))
    processor = build(folder)
    with pytest.raises(ValueError, match="must be the most pixels of height and width"):
        processor.info.get_hf_processor()
