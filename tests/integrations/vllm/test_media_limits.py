"""What strangers send: limits before decoding, wishes, pictures as meant, expanded runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations import media_files, media_memory
from tests.integrations.vllm.media_processor import build

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("limits") / "m3", preset="small")
    return build(folder)


def prepared(processor, prompt: list[int], data: Mapping[str, Any]) -> Any:
    return processor(prompt, processor.info.parse_mm_data(data))


def load(data: bytes, **wishes: Any) -> tuple[Any, dict[str, Any]]:
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO

    from m3_vllm import media  # noqa: F401  (registers the loader)

    return VideoMediaIO(ImageMediaIO(), video_backend="m3_plugin", **wishes).load_bytes(data).media


def test_a_claim_of_a_month_is_refused_at_once() -> None:
    data = media_files.endless_mkv()
    assert len(data) < 80_000
    with pytest.raises(ValueError, match="must last at most 86,400 s"):
        load(data)


def test_reading_ends_where_the_stream_does() -> None:
    """No header of this length passes the checks before; whatever passes them ends here."""
    from m3_vllm.media import M3VideoLoader

    class Stream:
        grabs = 0

        def get(self, prop: int) -> float:
            return 28.0

        def grab(self) -> bool:
            self.grabs += 1
            return False

    stream = Stream()
    frames, valid = M3VideoLoader.read_frames(stream, [0, 10**9], 10**9)
    assert (len(frames), valid) == (0, [])
    assert stream.grabs < 1000


def test_too_many_pixels_are_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """An mp4 of 600 frames of 3840x2160, all of them the same few bytes."""
    import cv2

    frame = media_files.jpeg((0, 0, 255), size=(64, 36))
    data = media_files.mp4([frame] * 600, size=(3840, 2160))
    decoded: list[None] = []

    class Capture:
        def __init__(self, *given: Any) -> None:
            self.inner = cv2_capture(*given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def get(self, prop: int) -> float:
            sizes = {cv2.CAP_PROP_FRAME_WIDTH: 3840.0, cv2.CAP_PROP_FRAME_HEIGHT: 2160.0}
            return sizes.get(prop) or self.inner.get(prop)

        def retrieve(self, *given: Any) -> Any:
            decoded.append(None)
            return self.inner.retrieve(*given)

    # the decoder reads the size from the first frame, which a file of this test cannot afford
    cv2_capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    with pytest.raises(ValueError, match=r"at most 301,056,000 .* \(600 frames of 1008x560\)"):
        load(data)
    assert not decoded


def test_big_frames_are_shrunk_as_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what transformers' video processor makes of them, bit for bit."""
    from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
        MiniMaxM3VLVideoProcessor,
    )

    from m3_vllm import media

    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    frame = media_files.encoded(Image.fromarray(noise), "JPEG", quality=60)
    data = media_files.mp4([frame] * 3, size=(1280, 720))
    whole, _ = load(data)
    monkeypatch.setattr(media, "_MAX_HELD_PIXELS", 10_000)
    shrunk, metadata = load(data)
    assert whole.shape == (3, 720, 1280, 3)
    assert shrunk.shape == (3, 560, 1008, 3)
    assert metadata["frames_indices"] == [0, 1, 2]
    videos = MiniMaxM3VLVideoProcessor()
    expected, ours = (
        videos(videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
        for frames in (whole, shrunk)
    )
    assert torch.equal(ours["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize("held", [10, 10**9])
def test_patches_take_the_memory_of_frames_of_a_long_file(
    processor, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """And of no others; whoever reads the frames again gets the same patches again."""
    from m3_vllm import media

    monkeypatch.setattr(media, "_MAX_HELD_PIXELS", held)
    noise = np.random.default_rng(0).integers(0, 256, (5, 84, 112, 3), dtype=np.uint8)
    data = media_files.mp4([media_files.encoded(Image.fromarray(n), "JPEG") for n in noise])
    prompt = processor.info.get_tokenizer().encode(VIDEO)

    def patches(video: Any) -> torch.Tensor:
        found = prepared(processor, prompt, {"video": video})
        return found["mm_kwargs"]["video"][0]["pixel_bytes_videos"].data

    frames, metadata = load(data)
    given = np.array(frames)
    before = given.copy()
    expected = patches((given, metadata))
    assert np.array_equal(given, before)
    found = patches((frames, metadata))
    assert torch.equal(found, expected)
    assert (found.data_ptr() == frames.ctypes.data) is (held == 10)
    again = patches((frames, metadata))
    assert torch.equal(again, expected)
    assert torch.equal(found, expected)
    assert again.data_ptr() != found.data_ptr()


@pytest.mark.parametrize("recovery", [False, True])
def test_a_broken_frame_is_left_out_or_replaced(recovery: bool) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)]
    frames = [media_files.jpeg(colour) for colour in colours]
    frames[2] = b"not a picture"
    loaded, metadata = load(media_files.mp4(frames, fps=2), frame_recovery=recovery)
    assert metadata["frames_indices"] == ([0, 3, 4] if recovery else [0, 4])
    assert len(loaded) == len(metadata["frames_indices"])


@pytest.mark.parametrize("value", [1e9, -2, 0, "2", True])
@pytest.mark.parametrize("name", ["fps", "max_frames", "num_frames"])
def test_absurd_wishes_are_refused(name: str, value: object) -> None:
    data = media_files.mp4([media_files.jpeg((0, 0, 0))])
    with pytest.raises(ValueError, match="must be"):
        load(data, **{name: value})


def test_a_video_of_one_frame_is_one() -> None:
    frames, metadata = load(media_files.mp4([media_files.jpeg((255, 0, 0))]))
    assert (len(frames), metadata["frames_indices"]) == (1, [0])


@pytest.mark.parametrize("matrix", sorted(media_files.TURNED))
def test_phones_videos_are_upright(matrix: str) -> None:
    frames, metadata = load(media_files.turned_video(matrix))
    assert metadata["frames_indices"] == [0, 1]
    media_files.require_upright(frames[0], matrix)


def test_wishes_are_honoured() -> None:
    data = media_files.mp4([media_files.jpeg((0, 0, 0))] * 16, fps=4)
    given = ({}, {"fps": 2}, {"max_frames": 3}, {"num_frames": 3}, {"num_frames": 32})
    assert [len(load(data, **wish)[0]) for wish in given] == [5, 9, 3, 3, 5]


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 64, media_files.mp4([b"x"]), media_files.mp4([], handler=b"soun")],
    ids=["empty", "zeros", "broken frame", "no video"],
)
def test_files_without_a_frame_are_the_clients_mistake(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"video|frame"):
        load(data)


def test_16_bit_greys_are_scaled(processor) -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    deep = Image.fromarray(np.full((56, 56), 300, np.uint16))
    plain = Image.new("RGB", (56, 56), (1, 1, 1))
    tokens = processor.info.get_tokenizer().encode(IMAGE)
    file = ImageMediaIO().load_bytes(media_files.encoded(deep, "PNG"))
    one, two, expected = (
        prepared(processor, tokens, {"image": image})["mm_kwargs"]["image"][0]["pixel_bytes"].data
        for image in (file, deep, plain)
    )
    assert torch.equal(one, expected)
    assert torch.equal(two, expected)


def test_expanded_prompts_are_kept_or_refused(processor) -> None:
    tokenizer = processor.info.get_tokenizer()
    frames = np.zeros((5, 56, 56, 3), np.uint8)
    times = {"fps": 2.0, "frames_indices": [0, 2, 4, 6, 8], "do_sample_frames": False}
    data = {
        "image": [Image.new("RGB", (112, 84)), Image.new("RGB", (56, 56))],
        "video": [(frames, times)],
    }
    prompt = tokenizer.encode(f"a {IMAGE} then: {VIDEO} and {IMAGE}")
    first = prepared(processor, prompt, data)
    again = prepared(processor, first["prompt_token_ids"], data)
    assert again["prompt_token_ids"] == first["prompt_token_ids"]
    assert again["mm_placeholders"] == first["mm_placeholders"]
    # a turn later one picture is new and the others are expanded
    mixed = prepared(
        processor,
        [*first["prompt_token_ids"], *tokenizer.encode(f" or {IMAGE}")],
        {**data, "image": [*data["image"], Image.new("RGB", (28, 28))]},
    )
    grown = len(mixed["prompt_token_ids"]) - len(first["prompt_token_ids"])
    assert grown == len(tokenizer.encode(" or ")) + 4 + 2
    for modality in ("image", "video"):
        token = tokenizer.encode({"image": IMAGE, "video": VIDEO}[modality])[0]
        short = list(first["prompt_token_ids"])
        short.remove(token)
        with pytest.raises(ValueError, match=f"expanded {modality} of another size"):
            prepared(processor, short, data)


def test_surplus_placeholders_are_refused(processor) -> None:
    tokens = processor.info.get_tokenizer().encode(IMAGE * 2)
    with pytest.raises(ValueError, match="more image placeholders"):
        prepared(processor, tokens, {"image": Image.new("RGB", (56, 56))})


def test_the_same_file_with_other_settings_is_another_item(processor) -> None:
    """With vLLM's own processor cache: what a wish changes is never taken from an earlier one."""
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO

    colours = [(40 * i, 0, 0) for i in range(6)]
    clip = media_files.mp4([media_files.jpeg(c, size=(168, 84)) for c in colours], size=(168, 84))
    picture = media_files.encoded(Image.new("RGB", (400, 300), (9, 99, 200)), "PNG")
    bounds = [{}, {"max_pixels": 112 * 84}, {"max_pixels": 112 * 112}, {"min_pixels": 600 * 600}]
    by_kind = {
        kind: [{f"{kind}s_kwargs": bound} if bound else {} for bound in bounds]
        for kind in ("image", "video")
    }
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("image", {}, kwargs) for kwargs in by_kind["image"]
    ]
    cases += [
        ("video", wish, kwargs)
        for wish in ({}, {"fps": 0.5}, {"max_frames": 2}, {"max_frames": 3})
        for kwargs in by_kind["video"]
    ]
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
    hashes: set[str] = set()
    seen: set[str] = set()
    for kind, wish, kwargs in cases * 2:
        if kind == "image":
            item: Any = ImageMediaIO().load_bytes(picture)
        else:
            loader = VideoMediaIO(ImageMediaIO(), video_backend="m3_plugin", **wish)
            item = loader.load_bytes(clip)
        prompt = processor.info.get_tokenizer().encode({"image": IMAGE, "video": VIDEO}[kind])
        fresh, cached = (
            processor(
                prompt,
                processor.info.parse_mm_data({kind: [item]}),
                hf_processor_mm_kwargs=kwargs,
                cache=used,
            )
            for used in (None, cache)
        )
        assert cached["prompt_token_ids"] == fresh["prompt_token_ids"], (wish, kwargs)
        ours, expected = (result["mm_kwargs"][kind][0].get_data() for result in (cached, fresh))
        assert all(torch.equal(ours[name], value) for name, value in expected.items())
        assert cached["mm_hashes"] == fresh["mm_hashes"]
        (found,) = fresh["mm_hashes"][kind]
        seen.add(f"{kind} {wish} {kwargs}")
        hashes.add(found)
    assert len(hashes) == len(seen) == len(cases)


def test_a_checkpoint_without_processor_files(tmp_path: Path) -> None:
    """Text is rendered, and whatever asks for the processor is told which file is missing."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.exceptions import VLLMValidationError
    from vllm.plugins import load_general_plugins
    from vllm.renderers.params import ChatParams
    from vllm.renderers.registry import renderer_from_config

    load_general_plugins()
    folder = write_random_checkpoint(tmp_path / "m3", preset="engine")
    for name in ("", "video_"):
        (folder / f"{name}preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()

    def rendered(content: Any, **options: Any) -> list[int]:
        config = ModelConfig(model=str(folder), dtype="float32", max_model_len=8192, **options)
        renderer = renderer_from_config(VllmConfig(model_config=config))
        chat: Any = [{"role": "user", "content": content}]
        prompt: Any
        (prompt,) = renderer.render_chat([chat], ChatParams())[1]
        return prompt["prompt_token_ids"]

    assert rendered("so") == rendered("so", language_model_only=True)
    file = media_files.encoded(Image.new("RGB", (56, 56)), "PNG")
    part = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{b64encode(file).decode()}"},
    }
    with pytest.raises(ValueError, match=r"its preprocessor_config\.json .* --language-model-only"):
        rendered([part])
    with pytest.raises(VLLMValidationError, match="At most 0 image"):
        rendered([part], language_model_only=True)


@pytest.mark.parametrize("value", [10**12, -1, 0, "2", 1.5, True])
def test_absurd_areas_are_refused(processor, value: object) -> None:
    """Of a request; an operator's are merged with it."""
    items = processor.info.parse_mm_data({"image": Image.new("RGB", (56, 56))})
    for wish in (
        {"min_pixels": value},
        {"max_pixels": value},
        {"size": {"longest_edge": value}},
        {"images_kwargs": {"max_pixels": value}},
    ):
        with pytest.raises(ValueError, match="must be an integer from 1 to 35,389,440"):
            processor(IMAGE, items, hf_processor_mm_kwargs=wish)


@pytest.mark.extended
@pytest.mark.parametrize("case", media_memory.CASES, ids=str)
def test_large_frames_of_a_small_file_fill_no_memory(
    tmp_path: Path, case: media_memory.Case
) -> None:
    folder = write_random_checkpoint(tmp_path / "m3", preset="small")
    grown = case.grown_by(
        tmp_path,
        prepare=f"""
from tests.integrations.vllm.media_processor import build
from m3_vllm.media import M3VideoLoader
processor = build(Path({str(folder)!r}))
def patches(data):
    video = M3VideoLoader.load_bytes(data)
    items = processor.info.parse_mm_data({{"video": video}})
    return processor("{VIDEO}", items)["mm_kwargs"]["video"][0].get_data()["pixel_bytes_videos"]
""",
        load="patches",
    )
    assert grown < case.most, grown
