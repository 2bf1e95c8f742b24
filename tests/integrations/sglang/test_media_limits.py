"""What strangers send: limits before decoding, wishes, pictures as meant, expanded runs."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations import media_files, media_memory, mixed_media
from tests.integrations.pixels import normalised
from tests.integrations.sglang.media_processor import build, prepare

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["


@pytest.fixture(scope="module")
def processor(random_checkpoint: Callable[[str], Path]) -> Any:
    return build(random_checkpoint("engine"))


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def refusal(processor: Any, prompt: str | list[int], **media: Any) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        prepare(processor, prompt, **media)
    return str(caught.value)


def features(processor: Any, image: Any) -> torch.Tensor:
    (item,) = prepare(processor, IMAGE, image=[image]).mm_items
    return item.feature


def stamps(processor: Any, output: Any) -> list[str]:
    text = processor._tokenizer.decode(output.input_ids)
    return [part.rsplit("]<]", 1)[-1] for part in text.split(" seconds[>[")[:-1]]


def test_a_claim_of_a_month_sizes_nothing(processor: Any) -> None:
    """Decord counts the 81 frames that are there; a decoder that believes headers is refused."""
    from m3_sglang.processors.minimax_m3 import video_frames

    output = prepare(processor, VIDEO, video=[data_url(media_files.endless_mkv())])
    assert len(stamps(processor, output)) == 41

    class Believer:
        avg_fps = 1.0

        def __len__(self) -> int:
            return 3_000_000

    with pytest.raises(ValueError, match="must last at most 86,400 s"):
        video_frames(Believer())


class Decoder:
    """SGLang's decoder of a long video of big frames, all of them one in memory."""

    avg_fps = 1.0

    def __init__(self, total: int, height: int, width: int) -> None:
        self.total, self.frame_shape, self.decoded = total, (height, width), 0
        self.largest = 0

    def __len__(self) -> int:
        return self.total

    def get_frames_at(self, indices: list[int]) -> np.ndarray:
        self.decoded += len(indices)
        self.largest = max(self.largest, len(indices))
        return np.broadcast_to(np.uint8(7), (len(indices), *self.frame_shape, 3)).copy()


def test_too_many_pixels_are_refused_from_the_header(processor: Any) -> None:
    from m3_sglang.processors.minimax_m3 import video_frames

    decoder = Decoder(600, 2160, 3840)
    with pytest.raises(ValueError, match=r"at most 301,056,000 .* \(600 frames of 1008x560\)"):
        video_frames(decoder, resize=processor._frame_size)
    assert decoder.decoded == 0


def test_big_frames_are_shrunk_a_few_at_a_time(processor: Any) -> None:
    from m3_sglang.processors.minimax_m3 import video_frames

    decoder = Decoder(20, 2160, 3840)
    frames, _ = video_frames(decoder, resize=processor._frame_size)
    assert frames.shape == (20, 3, 560, 1008)
    assert decoder.largest * 2160 * 3840 <= 32_000_000


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_frames_are_the_same_if_decord_stands_still(
    processor: Any, monkeypatch: pytest.MonkeyPatch, kind: str, at_once: int
) -> None:
    from sglang.srt.managers.schedule_batch import Modality

    from m3_sglang import reading_ahead
    from m3_sglang.processors import minimax_m3

    frames = [media_files.jpeg((20 * i, 255 - 20 * i, 7 * i)) for i in range(12)]
    data = {
        "mp4": media_files.mp4(frames),
        "mkv": media_files.mkv(frames, range(12), duration=12.0),
        "avi": media_files.avi(frames, claimed=12),
    }[kind]

    def read() -> torch.Tensor:
        video = processor._load_single_item(data_url(data), Modality.VIDEO)
        return minimax_m3.video_frames(video)[0]

    expected = read()
    still: list[int] = []
    plain = reading_ahead.StillReader.get_frames_at
    monkeypatch.setattr(reading_ahead, "_MAX_AHEAD", 0)
    monkeypatch.setattr(minimax_m3, "_PIXELS_AT_ONCE", at_once * 112 * 84)
    monkeypatch.setattr(
        reading_ahead.StillReader,
        "get_frames_at",
        lambda self, indices: still.append(len(indices)) or plain(self, indices),
    )
    assert torch.equal(read(), expected)
    assert sum(still) == len(expected) == 12
    assert max(still) == at_once


def test_sparse_frames_are_read_on(processor: Any) -> None:
    """A seek after each of them would decode most frames of the file twice."""
    from sglang.srt.managers.schedule_batch import Modality

    from m3_sglang.reading_ahead import StillReader

    frame = media_files.jpeg((0, 0, 0))
    data = data_url(media_files.mp4([frame] * 60, fps=10))
    video = processor._load_single_item(data, Modality.VIDEO)
    sizes = {"height": 2160, "width": 3840}
    # the last frame is looked at too, however near it is
    assert StillReader.of(video, [0, 10, 20, 30, 40, 50, 59], **sizes) is None
    assert StillReader.of(video, [59], **sizes) is None
    assert StillReader.of(video, list(range(0, 60, 5)), **sizes) is not None
    assert StillReader.of(video, list(range(60)), height=84, width=112) is None
    assert StillReader.of(Decoder(600, 2160, 3840), list(range(600)), **sizes) is None


def test_patches_take_the_memory_of_frames_of_a_file(processor: Any) -> None:
    """And frames that a client sent stay as they are."""
    colours = [(40 * i, 255 - 40 * i, 9 * i) for i in range(5)]
    file = data_url(media_files.mp4([media_files.jpeg(colour) for colour in colours]))
    seen: list[Any] = []
    cut = processor.process_mm_data

    def watched(*given: Any, **options: Any) -> Any:
        (frames,) = options["videos"]
        seen.append((frames.data_ptr(), options["in_place"]))
        return cut(*given, **options)

    processor.process_mm_data = watched
    try:
        (item,) = prepare(processor, VIDEO, video=[file]).mm_items
        assert seen == [(item.feature.data_ptr(), True)]
        sent = noise_frames(5)
        before = sent.clone()
        (item,) = prepare(processor, VIDEO, video=[sent]).mm_items
        assert torch.equal(sent, before)
        assert seen[1] == (sent.data_ptr(), False)
        assert item.feature.data_ptr() != sent.data_ptr()
    finally:
        del processor.process_mm_data


def noise_frames(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 56, 84), dtype=torch.uint8)


def test_shrinking_first_is_transformers_resizing(processor: Any) -> None:
    from m3_sglang.processors.minimax_m3 import resized

    noise = torch.randint(0, 256, (2, 3, 900, 1201), dtype=torch.uint8)
    size = processor._frame_size(900, 1201)
    videos = processor._processor.video_processor
    options = {"do_resize": True, "return_tensors": "pt"}
    whole, shrunk = (videos(videos=[v], **options) for v in (noise, resized(noise, size)))
    assert torch.equal(whole["pixel_values_videos"], shrunk["pixel_values_videos"])


def test_work_leaves_the_event_loop(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_sglang.processors import minimax_m3

    threads: dict[str, int] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            threads[name] = threading.get_ident()
            return function(*given, **options)

        return call

    monkeypatch.setattr(minimax_m3, "video_frames", watched("decoding", minimax_m3.video_frames))
    monkeypatch.setattr(processor, "process_mm_data", watched("patches", processor.process_mm_data))
    monkeypatch.setattr(minimax_m3, "upright_rgb", watched("picture", minimax_m3.upright_rgb))
    video = data_url(media_files.mp4([media_files.jpeg((255, 0, 0))] * 4))
    picture = data_url(media_files.jpeg((255, 0, 0)), "image/jpeg")

    async def request() -> int:
        await processor.process_mm_data_async(
            image_data=[picture],
            audio_data=None,
            input_text=IMAGE + VIDEO,
            request_obj=SimpleNamespace(video_data=[video]),
        )
        return threading.get_ident()

    loop = asyncio.run(request())
    assert set(threads) == {"decoding", "patches", "picture"}
    assert loop not in threads.values()


def test_pictures_are_upright_over_white_and_scaled(processor: Any) -> None:
    white = features(processor, Image.new("RGB", (56, 56), (255, 255, 255)))
    palette = Image.new("P", (56, 56), 0)
    palette.putpalette([0, 0, 0] * 256)
    clear = {
        "PNG": [
            Image.new("RGBA", (56, 56), (255, 0, 0, 0)),
            Image.new("RGBA", (56, 56), (0, 0, 0, 0)),
            Image.new("LA", (56, 56), (0, 0)),
        ],
        "WEBP": [Image.new("RGBA", (56, 56), (255, 0, 0, 0))],
    }
    for kind, images in clear.items():
        for image in images:
            file = media_files.encoded(
                image, kind, **({"lossless": True} if kind == "WEBP" else {})
            )
            assert torch.equal(features(processor, data_url(file, "image/png")), white)
    file = media_files.encoded(palette, "PNG", transparency=0)
    assert torch.equal(features(processor, data_url(file, "image/png")), white)
    deep = Image.fromarray(np.full((56, 56), 300, np.uint16))
    almost_black = features(processor, Image.new("RGB", (56, 56), (1, 1, 1)))
    file = media_files.encoded(deep, "PNG")
    assert torch.equal(features(processor, data_url(file, "image/png")), almost_black)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (168, 84, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = media_files.encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert torch.equal(
        features(processor, data_url(turned, "image/png")), features(processor, upright)
    )


def test_bombs_are_the_clients_mistake(processor: Any) -> None:
    bomb = data_url(media_files.bomb(), "image/png")
    assert "could be decompression bomb" in refusal(processor, IMAGE, image=[bomb])


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 64, media_files.mp4([b"x"]), media_files.mp4([], handler=b"soun")],
    ids=["empty", "zeros", "broken frame", "no video"],
)
def test_files_without_a_frame_are_the_clients_mistake(processor: Any, data: bytes) -> None:
    assert refusal(processor, VIDEO, video=[data_url(data)])


FILE = data_url(media_files.mp4([media_files.jpeg((0, 0, 0))] * 16, fps=4))


def test_local_files_are_looked_at_too(processor: Any, tmp_path: Path) -> None:
    """SGLang opens paths that a client names."""
    red = [media_files.jpeg((255, 0, 0))] * 4
    whole = media_files.mkv(red, [0, 1, 2, 3], duration=4.0)
    files = {
        "whole.mkv": whole,
        "recorded.webm": media_files.mkv(red, [0, 1, 2, 3], duration=None),
        "animated.gif": media_files.encoded(
            Image.new("RGB", (112, 84)),
            "GIF",
            save_all=True,
            append_images=[
                Image.new("RGB", (112, 84), colour) for colour in ("red", "blue", "white")
            ],
            duration=1000,
        ),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        (item,) = prepare(processor, VIDEO, video=[f"file://{tmp_path / name}"]).mm_items
        assert item.video_grid_thw[0].tolist() == [2, 6, 8]
    lying = tmp_path / "lying.avi"
    lying.write_bytes(media_files.avi(red, claimed=2**32 - 1))
    for path in (lying, "/dev/zero", tmp_path):
        assert refusal(processor, VIDEO, video=[f"file://{path}"])


def test_wishes_are_honoured(processor: Any) -> None:
    from sglang.srt.utils.common import VideoData

    def sampled(**wish: Any) -> list[str]:
        video = VideoData(FILE, preprocess_kwargs=wish)
        return stamps(processor, prepare(processor, VIDEO, video=[video]))

    assert sampled() == ["0.0", "2.0", "3.8"]
    assert sampled(fps=2) == ["0.0", "1.0", "2.0", "3.0", "3.8"]
    assert sampled(max_frames=2) == ["0.0"]


@pytest.mark.parametrize("value", [1e9, -1, 0, "2", True])
@pytest.mark.parametrize("name", ["fps", "max_frames"])
def test_absurd_wishes_are_refused(processor: Any, name: str, value: object) -> None:
    from sglang.srt.utils.common import VideoData

    video = VideoData(FILE, preprocess_kwargs={name: value})
    assert "must be" in refusal(processor, VIDEO, video=[video])


def test_the_long_side_is_bounded(processor: Any) -> None:
    from sglang.srt.utils.common import ImageData, VideoData

    file = data_url(media_files.encoded(Image.new("RGB", (1000, 500)), "PNG"), "image/png")

    def grid(wish: int | None) -> list[int]:
        picture = ImageData(file, max_long_side_pixel=wish)
        (item,) = prepare(processor, IMAGE, image=[picture]).mm_items
        return item.image_grid_thw[0].tolist()

    assert grid(448) == [1, 16, 32]
    assert grid(None)[2] > 32
    for wish in (1, 10**9, 113, -1):
        picture = ImageData(file, max_long_side_pixel=wish)
        assert "max_long_side_pixel" in refusal(processor, IMAGE, image=[picture])
    video = VideoData(
        data_url(media_files.mp4([media_files.jpeg((0, 0, 0), size=(448, 224))], size=(448, 224))),
        max_long_side_pixel=112,
    )
    (item,) = prepare(processor, VIDEO, video=[video]).mm_items
    assert item.video_grid_thw[0].tolist() == [1, 4, 8]


def test_frames_come_in_every_form(processor: Any) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 56, 84, 3), np.uint8)
    as_tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = prepare(processor, VIDEO, video=[as_tensor])
    for form in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        output = prepare(processor, VIDEO, video=[form])
        assert output.input_ids == expected.input_ids
        assert torch.equal(output.mm_items[0].feature, expected.mm_items[0].feature)
    (item,) = prepare(processor, VIDEO, video=[frames[:1]]).mm_items
    assert item.video_grid_thw[0].tolist() == [1, 4, 6]
    for wrong in ([], [frames[0], frames[0, :28]], frames[0], frames[..., :2], as_tensor[0]):
        assert "frames" in refusal(processor, VIDEO, video=[wrong])


def test_phones_turn_their_videos(processor: Any) -> None:
    frames = [media_files.jpeg((255, 0, 0))] * 2
    for matrix, grid in ((media_files.UPRIGHT, [1, 6, 8]), (media_files.QUARTER, [1, 8, 6])):
        video = data_url(media_files.mp4(frames, matrix=matrix))
        (item,) = prepare(processor, VIDEO, video=[video]).mm_items
        assert item.video_grid_thw[0].tolist() == grid


@pytest.mark.parametrize("matrix", sorted(media_files.TURNED))
def test_phones_videos_are_upright(processor: Any, matrix: str) -> None:
    from sglang.srt.managers.schedule_batch import Modality

    from m3_sglang.processors.minimax_m3 import video_frames

    data = media_files.turned_video(matrix)
    video = processor._load_single_item(data_url(data), Modality.VIDEO)
    frames, _ = video_frames(video)
    media_files.require_upright(frames[0].permute(1, 2, 0).numpy(), matrix)


def test_expanded_prompts_are_kept_or_refused(processor: Any) -> None:
    tokenizer = processor._tokenizer
    images = [Image.new("RGB", (112, 84)), Image.new("RGB", (56, 56))]
    media: dict[str, Any] = {"image": images, "video": [FILE]}
    text = f"a {IMAGE} then: {VIDEO} and {IMAGE}"
    first = prepare(processor, text, **media)
    for prompt in (first.input_ids, tokenizer.decode(first.input_ids)):
        again = prepare(processor, prompt, **media)
        assert again.input_ids == first.input_ids
        assert [i.offsets for i in again.mm_items] == [i.offsets for i in first.mm_items]
    more = [*first.input_ids, *tokenizer.encode(IMAGE)]
    mixed = prepare(processor, more, **media | {"image": [*images, Image.new("RGB", (28, 28))]})
    assert len(mixed.input_ids) == len(first.input_ids) + 4 + 2
    for name, token in (("image", IMAGE), ("video", VIDEO)):
        short = list(first.input_ids)
        short.remove(tokenizer.encode(token)[0])
        assert f"expanded {name} of another size" in refusal(processor, short, **media)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("order", mixed_media.ORDERS)
def test_media_in_every_order_are_laid_out_by_transformers(
    processor: Any, random_checkpoint: Callable[[str], Path], order: str, as_ids: bool
) -> None:
    prompt = mixed_media.mixed_prompt(order)
    right = mixed_media.prepared(random_checkpoint("engine"), prompt)
    text = processor._tokenizer(prompt.text).input_ids if as_ids else prompt.text
    videos = [torch.from_numpy(video).permute(0, 3, 1, 2) for video in prompt.videos]
    output = prepare(processor, text, image=prompt.images, video=videos)
    assert output.input_ids == right["input_ids"][0].tolist()
    for kind, name, token in (
        ("image", "pixel_values", processor.ids.image),
        ("video", "pixel_values_videos", processor.ids.video),
    ):
        items = [item for item in output.mm_items if item.modality.name.lower() == kind]
        assert torch.equal(normalised(torch.cat([item.feature for item in items])), right[name])
        places = [offset for item in items for offset in item.offsets]
        # in the order in which they are sent, each at its own place
        assert places == sorted(places)
        covered = [output.input_ids[first : last + 1] for first, last in places]
        assert {i for run in covered for i in run} == {token}
        assert sum(map(len, covered)) == output.input_ids.count(token)


def test_media_and_placeholders_must_be_as_many(processor: Any) -> None:
    image = Image.new("RGB", (56, 56))
    assert "more image placeholders" in refusal(processor, IMAGE * 2, image=[image])
    assert "more images sent" in refusal(processor, "none", image=[image])
    assert "more video placeholders" in refusal(processor, IMAGE + VIDEO, image=[image])


def test_prepared_items_are_refused_by_name(processor: Any) -> None:
    for kind in ("processor_output", "precomputed_embedding"):
        item = {"format": kind, "feature": torch.zeros(4, 8)}
        assert "are not served by m3-plugin" in refusal(processor, IMAGE, image=[item])


def pad_values(processor: Any, modality: str, item: Any) -> list[int]:
    """By which SGLang's prefix and embedding caches know an item."""
    prompt = {"image": IMAGE, "video": VIDEO}[modality]
    (found,) = prepare(processor, prompt, **{modality: [item]}).mm_items
    found.set_pad_value()
    return [found.hash, found.pad_value]


def test_the_same_file_with_other_settings_is_another_item(processor: Any) -> None:
    from sglang.srt.utils.common import ImageData, VideoData

    colours = [(40 * i, 0, 0) for i in range(6)]
    frames = [media_files.jpeg(c, size=(168, 84)) for c in colours]
    clip = data_url(media_files.mp4(frames, size=(168, 84)))
    picture = data_url(media_files.encoded(Image.new("RGB", (400, 300), (9, 99, 200)), "PNG"))
    items: list[tuple[str, Any]] = [
        ("image", ImageData(picture, max_long_side_pixel=side)) for side in (None, 112, 224)
    ]
    items += [
        ("video", VideoData(clip, max_long_side_pixel=side, preprocess_kwargs=wish))
        for side in (None, 112)
        for wish in ({}, {"fps": 0.5}, {"max_frames": 2}, {"max_frames": 3})
    ]
    known = [pad_values(processor, *item) for item in items]
    assert [pad_values(processor, *item) for item in items] == known
    for values in zip(*known, strict=True):
        assert len(set(values)) == len(items)


def test_pictures_of_the_same_patches_in_another_shape_are_two(processor: Any) -> None:
    """Of one colour, so that every patch is the same; and a video of one such frame."""
    wide, tall = (Image.new("RGB", size, (1, 2, 3)) for size in ((112, 56), (56, 112)))
    still = np.asarray(wide)[None]
    items: list[tuple[str, Any]] = [("image", wide), ("image", tall), ("video", still)]
    features = [
        prepare(processor, {"image": IMAGE, "video": VIDEO}[m], **{m: [item]}).mm_items[0]
        for m, item in items
    ]
    assert torch.equal(features[0].feature, features[1].feature)
    assert len({tuple(pad_values(processor, *item)) for item in items}) == 3


def test_a_checkpoint_without_processor_files_is_refused_at_the_start(tmp_path: Path) -> None:
    """By SGLang, before it asks us; it has no option that serves the text of M3 alone."""
    folder = write_random_checkpoint(tmp_path / "m3", preset="small")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"a file named preprocessor_config\.json"):
        build(folder)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_absurd_areas_of_a_server_are_refused(
    random_checkpoint: Callable[[str], Path], modality: str
) -> None:
    wishes = {modality: {"max_pixels": -1}}
    with pytest.raises(ValueError, match="max_pixels must be an integer from 1 to 35,389,440"):
        build(random_checkpoint("engine"), mm_process_config=wishes)


_MOST_AT_THE_LIMIT = 1_200_000_000


@pytest.mark.extended
@pytest.mark.parametrize("pause", [0.0, 0.2], ids=["at once", "slowly"])
@pytest.mark.parametrize("case", media_memory.CASES, ids=str)
def test_large_frames_of_a_small_file_fill_no_memory(
    tmp_path: Path, case: media_memory.Case, pause: float
) -> None:
    """However slowly frames are shrunk: decord would decode others meanwhile."""
    if pause and case.frames > 100:
        pytest.skip("the short video shows it")
    folder = write_random_checkpoint(tmp_path / "m3", preset="engine")
    grown = case.grown_by(
        tmp_path,
        prepare=f"""
import time
from m3_sglang.processors import minimax_m3
from tests.integrations.sglang.media_processor import build, prepare
resized = minimax_m3.resized
def slowly(frames, size):
    time.sleep({pause})
    return resized(frames, size)
minimax_m3.resized = slowly
processor = build(Path({str(folder)!r}))
def patches(data):
    (item,) = prepare(processor, "{VIDEO}", video=[data]).mm_items
    return item.feature
""",
        load="patches",
    )
    # decord holds some frames of its own, and packets of the file
    assert grown < max(case.most, _MOST_AT_THE_LIMIT if case.frames > 100 else 0), grown
