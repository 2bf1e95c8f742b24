"""Prompts and pixel values against transformers' own processor, token for token and bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3_plugin.testing.hub_layout import byte_level_tokenizer
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations.pixels import normalised

pytestmark = pytest.mark.vllm

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
# Words of more than one byte to which a time stamp's "]<]" can belong, as in the published
# vocabulary, and how text is cut into words.
_MERGED = ("]<]", " ]<]", ":]<]", "]]<]", "[>[", "the", " the", " seconds", "00", " 7")
_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_CHANNELS = {"RGB": 3, "RGBA": 4, "L": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("multimodal") / "m3", preset="small")
    # Special tokens keep their ids, the first ones.
    tokenizer = byte_level_tokenizer(words=_MERGED, pattern=_PATTERN)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model_config(checkpoint: Path):
    from vllm.config import ModelConfig

    return ModelConfig(model=str(checkpoint), dtype="float32", max_model_len=8192)


@pytest.fixture(scope="module")
def tokenizer(model_config):
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)


@pytest.fixture(scope="module")
def processor(model_config, tokenizer):
    from vllm.multimodal.processing.context import InputProcessingContext

    from m3_vllm.media import M3DummyInputsBuilder, M3MultiModalProcessor, M3ProcessingInfo

    info = M3ProcessingInfo(InputProcessingContext(model_config, tokenizer))
    return M3MultiModalProcessor(info, M3DummyInputsBuilder(info))


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


def _image(width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height, width, _CHANNELS[mode]), dtype=np.uint8
    )
    return Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels)


def _video(frames: int, width: int, height: int, *, seed: int = 0) -> np.ndarray:
    shape = (frames, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _timed(frames: np.ndarray, *, fps: float, step: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A video as vLLM's loaders return it."""
    indices = list(range(0, len(frames) * step, step))
    metadata = {
        "total_num_frames": indices[-1] + 1,
        "fps": fps,
        "duration": indices[-1] / fps,
        "video_backend": "opencv",
        "frames_indices": indices,
        "do_sample_frames": False,
    }
    return frames, metadata


def _process(processor, text: str, data: Mapping[str, Any], *, cache=None, **kwargs: Any):
    prompt = processor.info.get_tokenizer().encode(text)
    items = processor.info.parse_mm_data(data)
    return processor(prompt, items, hf_processor_mm_kwargs=kwargs, cache=cache)


def _segments(grids: list[list[int]]) -> list[tuple[int, int, int]]:
    from m3_plugin.model.vision import split_segments

    return split_segments(grids, segment_patches=4)


def _assert_equal(
    processor, reference, text: str, data: Mapping[str, list[Any]], **kwargs: Any
) -> None:
    """Compare with one call of transformers' processor; videos may be (frames, metadata)."""
    result = _process(processor, text, data, **kwargs)
    inputs: dict[str, Any] = {"images": data.get("image"), "videos": None}
    if videos := data.get("video"):
        timed = isinstance(videos[0], tuple)
        inputs["videos"] = [video[0] for video in videos] if timed else videos
        if timed:
            keys = ("total_num_frames", "fps", "frames_indices")
            inputs["video_metadata"] = [{k: m[k] for k in keys} for _, m in videos]
    expected = reference(text=[text], return_tensors="pt", **inputs, **kwargs)

    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
    for modality, pixels, as_bytes, grid, token in (
        ("image", "pixel_values", "pixel_bytes", "image_grid_thw", reference.image_token_id),
        (
            "video",
            "pixel_values_videos",
            "pixel_bytes_videos",
            "video_grid_thw",
            reference.video_token_id,
        ),
    ):
        if modality not in data:
            continue
        items = [item.get_data() for item in result["mm_kwargs"][modality]]
        sent = normalised(torch.cat([item[as_bytes] for item in items]))
        assert torch.equal(sent, expected[pixels])
        # transformers reports a video as one grid (5.19) or as its attention segments (5.23).
        grids = [item[grid].tolist() for item in items]
        assert _segments(grids) == _segments(expected[grid].tolist())
        # What vLLM overwrites with features are the placeholder tokens, all of them, no others.
        prompt = torch.tensor(result["prompt_token_ids"])
        marked = torch.zeros(len(prompt), dtype=torch.bool)
        for item, place in zip(items, result["mm_placeholders"][modality], strict=True):
            marked[place.offset : place.offset + place.length] = place.is_embed
            assert place.get_num_embeds() == item[grid].prod() // 4
        assert torch.equal(marked, prompt == token)


@pytest.mark.parametrize(
    ("width", "height", "mode", "tokens"),
    [
        (28, 28, "RGB", 4),
        (112, 140, "RGB", 20),
        (1920, 1080, "RGB", 576),
        (2000, 20, "RGB", 71),
        (13, 2600, "RGB", 29),
        (672, 672, "RGB", 576),
        (100, 75, "L", 12),
    ],
)
def test_image(processor, reference, width: int, height: int, mode: str, tokens: int) -> None:
    image = _image(width, height, mode=mode)
    _assert_equal(processor, reference, f"the {IMAGE} is", {"image": [image]})
    result = _process(processor, IMAGE, {"image": image})
    assert len(result["prompt_token_ids"]) == tokens + 2


def test_transparent_images_lie_on_white(processor, reference) -> None:
    image = _image(100, 75, mode="RGBA")
    flat = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(flat, image).convert("RGB")
    result = _process(processor, IMAGE, {"image": image})
    expected = reference(text=[IMAGE], images=[flat], return_tensors="pt")
    pixels = normalised(result["mm_kwargs"]["image"][0]["pixel_bytes"].data)
    # One of 255 levels is 0.015 after normalisation; the two compositions round differently.
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=0.04)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_images(processor, reference, count: int) -> None:
    images = [_image(60 + 50 * i, 90, seed=i) for i in range(count)]
    text = "Compare: " + " and ".join([IMAGE] * count) + "."
    _assert_equal(processor, reference, text, {"image": images})


@pytest.mark.parametrize(
    ("frames", "width", "height"),
    [(1, 56, 56), (2, 56, 84), (8, 112, 140), (11, 112, 140), (3, 672, 896), (17, 56, 56)],
)
@pytest.mark.parametrize("timed", [False, True], ids=["", "timed"])
def test_video(processor, reference, frames: int, width: int, height: int, timed: bool) -> None:
    video: Any = _video(frames, width, height)
    if timed:
        video = _timed(video, fps=23.976, step=24)
    _assert_equal(processor, reference, f"What happens in\n{VIDEO}\n?", {"video": [video]})


@pytest.mark.parametrize("before", ["", "the ", "Look:", "a\n", "]", "]~b]user\n", "7 ] <] "])
def test_time_stamps_merge_with_the_text_before_them(processor, reference, before: str) -> None:
    videos = [_timed(_video(5, 56, 56, seed=i), fps=30.0, step=15 * (i + 1)) for i in range(3)]
    text = f"{before}{VIDEO} and {VIDEO}{VIDEO} end"
    _assert_equal(processor, reference, text, {"video": videos})


def test_the_tokenizer_here_can_show_a_merge(tokenizer) -> None:
    stamp = tokenizer.encode("]<]0.0 seconds[>[")
    for before in ("the ", "Look:", "]"):
        joint = tokenizer.encode(f"{before}]<]0.0 seconds[>[")
        assert joint != tokenizer.encode(before) + stamp


def test_time_stamps_leave_unusual_token_ids_alone(processor, tokenizer) -> None:
    # " the" spelt byte by byte, as no tokenizer would.
    spelt = [tokenizer.encode(c)[0] for c in " the"]
    prompt = [*spelt, *tokenizer.encode(VIDEO)]
    video = _timed(_video(2, 56, 56), fps=1.0, step=1)
    result = processor(prompt, processor.info.parse_mm_data({"video": video}))
    stamp = tokenizer.encode("]<]0.0 seconds[>[", add_special_tokens=False)
    assert result["prompt_token_ids"][: len(spelt) + len(stamp)] == spelt + stamp


def test_time_stamps_need_rate_and_indices(processor, tokenizer) -> None:
    frames, metadata = _timed(_video(4, 56, 56), fps=2.0, step=1)
    for known, stamped in (
        (metadata, True),
        ({**metadata, "fps": 0}, False),
        ({**metadata, "fps": None}, False),
        ({**metadata, "frames_indices": []}, False),
        ({}, False),
    ):
        result = _process(processor, VIDEO, {"video": (frames, known)})
        text = tokenizer.decode(result["prompt_token_ids"])
        assert ("]<]1.0 seconds[>[" in text) == stamped


def test_images_and_videos_together(processor, reference) -> None:
    data = {
        "image": [_image(56, 84), _image(200, 100, seed=1)],
        "video": [_timed(_video(n, 84, 56, seed=n), fps=10.0, step=5) for n in (7, 10)],
    }
    text = f"]~b]user\n{VIDEO} is {IMAGE} or{IMAGE}? See {VIDEO}[e~[\n]~b]ai\n"
    _assert_equal(processor, reference, text, data)


def test_processor_cache_changes_nothing(processor, model_config) -> None:
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    cache = MultiModalProcessorOnlyCache(model_config)
    first, second = (_timed(_video(n, 56, 56, seed=n), fps=5.0, step=3) for n in (5, 12))
    image = _image(112, 56)

    def same(text: str, data: Mapping[str, list[Any]]) -> None:
        plain = _process(processor, text, data)
        cached = _process(processor, text, data, cache=cache)
        assert cached["prompt_token_ids"] == plain["prompt_token_ids"]
        assert cached["mm_hashes"] == plain["mm_hashes"]
        for modality, items in plain["mm_kwargs"].items():
            for ours, theirs in zip(cached["mm_kwargs"][modality], items, strict=True):
                assert ours is not None
                for key, value in theirs.get_data().items():
                    assert torch.equal(ours.get_data()[key], value)

    same(f"a {VIDEO}", {"video": [first]})
    same(f"a {VIDEO}", {"video": [first]})
    # A hit behind a miss, another text before it, another place among the items.
    same(f"Look:{VIDEO}{VIDEO} {IMAGE}", {"video": [second, first], "image": [image]})
    same(f"{IMAGE}{VIDEO}{IMAGE}", {"video": [second], "image": [image, image]})


def test_same_frames_at_other_times_are_another_item(processor) -> None:
    frames = _video(4, 56, 56)
    hashes = {
        _process(processor, VIDEO, {"video": _timed(frames, fps=fps, step=1)})["mm_hashes"][
            "video"
        ][0]
        for fps in (1.0, 2.0)
    }
    assert len(hashes) == 2


def test_releases_that_report_segments_are_joined(
    processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [_video(11, 112, 140), _video(8, 112, 140, seed=1), _video(3, 56, 56)]
    text = VIDEO * 3
    plain = _process(processor, text, {"video": videos})

    video_processor = type(processor.info.get_hf_processor().video_processor)
    whole = video_processor._preprocess

    def in_segments(self, *args: Any, **kwargs: Any):
        outputs = whole(self, *args, **kwargs)
        outputs["video_grid_thw"] = torch.tensor(
            [
                [min(4, t - start), h, w]
                for t, h, w in outputs["video_grid_thw"].tolist()
                for start in range(0, t, 4)
            ]
        )
        return outputs

    monkeypatch.setattr(video_processor, "_preprocess", in_segments)
    split = _process(processor, text, {"video": videos})
    assert split["prompt_token_ids"] == plain["prompt_token_ids"]
    for ours, theirs in zip(split["mm_kwargs"]["video"], plain["mm_kwargs"]["video"], strict=True):
        for key, value in theirs.get_data().items():
            assert torch.equal(ours.get_data()[key], value)


@pytest.mark.parametrize(
    ("size", "grid"), [((100, 150), [1, 10, 8]), ((1200, 900), [1, 46, 62]), ((20, 20), [1, 4, 4])]
)
def test_frames_of_any_size_are_resized(
    processor, reference, size: tuple[int, int], grid: list[int]
) -> None:
    video = _video(2, *size)
    resize = {"videos_kwargs": {"do_resize": True}}
    _assert_equal(processor, reference, VIDEO, {"video": [video]}, **resize)
    result = _process(processor, VIDEO, {"video": video})
    data = result["mm_kwargs"]["video"][0].get_data()
    assert data["video_grid_thw"].tolist() == grid
    expected = reference(text=[VIDEO], videos=[video], return_tensors="pt", **resize)
    assert torch.equal(normalised(data["pixel_bytes_videos"]), expected["pixel_values_videos"])


def test_bytes_and_floats_of_several_requests_stay_apart(processor, reference) -> None:
    """vLLM joins what the engine encodes at once; joined, bytes would be taken for normalised."""
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

    first, second = _image(56, 84, seed=1), _image(84, 56, seed=2)
    plain = [_process(processor, IMAGE, {"image": image}) for image in (first, second)]
    asked = _process(processor, IMAGE, {"image": first}, images_kwargs={"image_mean": [0.0] * 3})
    floats = np.asarray(second).transpose(2, 0, 1).astype(np.float32)
    given_floats = _process(processor, IMAGE, {"image": floats})
    items = [("image", result["mm_kwargs"]["image"][0]) for result in (*plain, asked, given_floats)]
    batches: list[Any] = list(group_and_batch_mm_kwargs(items))
    assert [(number, set(batch)) for _, number, batch in batches] == [
        (2, {"pixel_bytes", "image_grid_thw"}),
        (2, {"pixel_values", "image_grid_thw"}),
    ]
    expected = [
        reference(text=[IMAGE], images=[image], return_tensors="pt", **options)["pixel_values"]
        for image, options in (
            (first, {}),
            (second, {}),
            (first, {"images_kwargs": {"image_mean": [0.0] * 3}}),
            (floats, {}),
        )
    ]
    assert torch.equal(normalised(batches[0][2]["pixel_bytes"]), torch.cat(expected[:2]))
    assert torch.equal(batches[1][2]["pixel_values"], torch.cat(expected[2:]))


def test_resizing_can_be_refused(processor, reference) -> None:
    video = _video(2, 1120, 1120)
    for kwargs in ({"videos_kwargs": {"do_resize": False}}, {"do_resize": False}):
        _assert_equal(processor, reference, VIDEO, {"video": [video]}, **kwargs)


def test_sampling_in_the_processor_is_refused(processor) -> None:
    video = _timed(_video(20, 56, 56), fps=10.0, step=1)
    with pytest.raises(ValueError, match="do_sample_frames must be false"):
        _process(processor, VIDEO, {"video": video}, videos_kwargs={"do_sample_frames": True})


def test_audio_is_refused_with_the_reason(processor) -> None:
    from m3_vllm.media import M3MultiModalMixin

    info = processor.info
    assert dict(info.get_supported_mm_limits()) == {"image": None, "video": None}
    message = "MiniMax-M3 has no audio tower"
    with pytest.raises(ValueError, match=message):
        info.parse_mm_data({"audio": (np.zeros(1600), 16000)})
    # The chat endpoint asks these two, in this order.
    with pytest.raises(ValueError, match=message):
        info.validate_num_items("audio", 1)
    with pytest.raises(ValueError, match=message):
        M3MultiModalMixin.get_placeholder_str("audio", 1)
    assert M3MultiModalMixin.get_placeholder_str("image", 1) == IMAGE
    assert M3MultiModalMixin.get_placeholder_str("video", 1) == VIDEO


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    short=st.integers(1, 3000),
    aspect=st.floats(1.0, 200.0),
    upright=st.booleans(),
    bounds=st.sampled_from([(3136, 451_584), (3136, 602_112), (3136, 12_544), (3136, 3136)]),
)
def test_no_image_has_more_tokens_than_announced(
    short: int, aspect: float, upright: bool, bounds: tuple[int, int]
) -> None:
    from transformers.models.minimax_m3_vl.image_processing_minimax_m3_vl import (
        MiniMaxM3VLImageProcessor,
    )

    from m3_vllm.media import PatchGeometry

    processor = MiniMaxM3VLImageProcessor(
        size={"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    )
    sides = (short, int(short * aspect))
    height, width = sides[::-1] if upright else sides
    tokens = processor.get_number_of_image_patches(height, width) // 4
    geometry = PatchGeometry.of(processor)
    assert tokens <= geometry.max_tokens
    largest = geometry.largest
    most = processor.get_number_of_image_patches(largest.height, largest.width) // 4
    assert most == bounds[1] // 784


def test_memory_profile_is_as_large_as_announced_and_bounded(processor) -> None:
    counts = {"image": 1, "video": 1}
    announced = processor.info.get_mm_max_tokens_per_item(8192, counts)
    assert announced == {"image": 576, "video": 10 * 768}
    dummy = processor.get_dummy_mm_inputs(counts)
    measured = {
        modality: [place.get_num_embeds() for place in places]
        for modality, places in dummy["mm_placeholders"].items()
    }
    assert measured == {modality: [tokens] for modality, tokens in announced.items()}
    # At the released context length it is the largest video MiniMax's service accepts.
    assert processor.info.max_video_frames(1_048_576) == 500
    assert processor.info.max_video_frames(8192, num_videos=2) == 10
    # Where not even one pair of frames fits, one is still there to be measured.
    assert processor.info.max_video_frames(100) == 2


@pytest.mark.parametrize(
    ("total", "source_fps", "fps", "expected"),
    [
        (30, 10.0, 1.0, [0, 10, 20, 29]),
        (31, 10.0, 1.0, [0, 10, 20, 30]),
        (5, 25.0, 1.0, [0, 4]),
        (1, 25.0, 1.0, [0]),
        (90, 29.97, 1.0, [0, 30, 60, 89]),
        (10, 4.0, 8.0, list(range(10))),
    ],
)
def test_frames_are_sampled_by_time(
    total: int, source_fps: float, fps: float, expected: Sequence[int]
) -> None:
    assert _sampled(total, source_fps, fps) == expected


def test_a_long_video_is_thinned_out() -> None:
    indices = _sampled(7200 * 25, 25.0, 1.0)
    assert len(indices) == 768
    assert (indices[0], indices[-1]) == (0, 7200 * 25 - 1)
    gaps = np.diff(indices)
    assert gaps.min() >= 200
    assert gaps.max() <= 275


def _sampled(total: int, source_fps: float, fps: float) -> list[int]:
    from m3_vllm.media import M3VideoLoader

    source = SimpleNamespace(total_frames_num=total, original_fps=source_fps)
    target = SimpleNamespace(num_frames=32, fps=fps)
    return M3VideoLoader.compute_frames_index_to_sample(source, target)


def test_a_video_file_reaches_the_prompt(
    processor, model_config, tokenizer, tmp_path: Path
) -> None:
    import cv2
    from vllm.multimodal.media import VIDEO_LOADER_REGISTRY
    from vllm.multimodal.video import get_video_loader_backend_for_processor
    from vllm.transformers_utils.processor import get_video_processor_cls_name

    # the host's own model, whose loader claims the same processor
    importlib.import_module("vllm.models.minimax_m3.common.mm_preprocess")
    name = get_video_loader_backend_for_processor(get_video_processor_cls_name(model_config))
    assert name == "m3_plugin"
    file = tmp_path / "video.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (112, 84))
    for i in range(35):
        writer.write(np.full((84, 112, 3), 7 * i, dtype=np.uint8))
    writer.release()
    # 32 frames is what vLLM passes when nobody asks for a number.
    video = VIDEO_LOADER_REGISTRY.load(name).load_bytes(file.read_bytes(), num_frames=32)
    assert video[1]["frames_indices"] == [0, 10, 20, 30, 34]
    result = _process(processor, VIDEO, {"video": video})
    assert result["mm_kwargs"]["video"][0]["video_grid_thw"].data.tolist() == [3, 6, 8]
    text = tokenizer.decode(result["prompt_token_ids"])
    stamps = [part.rsplit("]<]", 1)[-1] for part in text.split(" seconds[>[")[:-1]]
    assert stamps == ["0.0", "2.0", "3.4"]


def test_embeddings_come_per_item_in_the_order_of_the_keywords() -> None:
    from m3_plugin.model.pixels import PixelScale
    from m3_plugin.model.vision import M3Vision, VisionConfig
    from m3_vllm.media import M3MultiModalMixin

    class Model(torch.nn.Module, M3MultiModalMixin):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = M3Vision(
                VisionConfig(
                    hidden_size=80,
                    intermediate_size=32,
                    num_layers=1,
                    num_heads=1,
                    text_hidden_size=24,
                    projector_hidden_size=16,
                ),
                scale=PixelScale.read({}),
            )

    images, videos = torch.tensor([[1, 4, 6], [1, 2, 2]]), torch.tensor([[5, 4, 4]])
    image_pixels = torch.randint(0, 256, (28, 1176), dtype=torch.uint8)
    video_pixels = torch.randn(80, 1176)
    # vLLM's interface is a protocol with parts that no model has to implement.
    model = cast(Any, Model)().requires_grad_(False)
    embeddings = model.embed_multimodal(
        pixel_values_videos=video_pixels,
        video_grid_thw=videos,
        image_grid_thw=images,
        pixel_bytes=image_pixels,
    )
    assert [tuple(x.shape) for x in embeddings] == [(20, 24), (6, 24), (1, 24)]
    torch.testing.assert_close(embeddings[0], model.vision_tower(video_pixels, videos))
    expected = model.vision_tower(normalised(image_pixels), images)
    torch.testing.assert_close(torch.cat(embeddings[1:]), expected)
    assert model.embed_multimodal() == ()
