"""Limits, frames, stamps and layouts of media, against slow readings of the same rules."""

from __future__ import annotations

import contextlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3_plugin.model import media
from m3_plugin.model.containers import with_times
from m3_plugin.model.media import (
    MediaTokens,
    Piece,
    find_places,
    lay_out,
    pieces_of,
    reading_media,
    require_plausible_header,
)
from tests.integrations import media_files

TOKENS = MediaTokens(image=1, video=2, start=3, end=4)


def slow_samples(total: int, *, fps: float, wanted_fps: float, max_frames: int) -> list[int]:
    """Frame after frame, as in the extraction the model was tuned with."""
    interval = (1.0 / wanted_fps - 1e-4) * fps
    indices = [0]
    while (following := max(math.ceil(indices[-1] + interval), indices[-1] + 1)) < total:
        indices.append(following)
    if indices[-1] != total - 1:
        indices.append(total - 1)
    if len(indices) > max_frames > 1:
        kept = np.linspace(0, len(indices) - 1, max_frames).round().astype(int)
        indices = [indices[i] for i in kept]
    return indices if len(indices) <= max_frames else [total - 1]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    total=st.integers(1, 20_000),
    fps=st.sampled_from([0.5, 1.0, 4.0, 10.0, 23.976, 25.0, 29.97, 30.0, 59.94, 240.0]),
    wanted_fps=st.sampled_from([0.2, 0.5, 1.0, 2.0, 3.3, 5.0]),
    max_frames=st.sampled_from([1, 2, 7, 32, 768]),
)
def test_sampling_in_closed_form_is_sampling_frame_by_frame(
    total: int, fps: float, wanted_fps: float, max_frames: int
) -> None:
    options = {"fps": fps, "wanted_fps": wanted_fps, "max_frames": max_frames}
    assert media.sampled_frames(total, **options) == slow_samples(total, **options)


def test_a_claimed_length_sizes_nothing() -> None:
    # ten hours at a rate no camera has
    assert len(media.sampled_frames(36 * 10**12, fps=1e9)) == media.MAX_FRAMES
    for total, fps in ((10**12, 25.0), (3_000_000, 1.0), (2**62, 30.0)):
        with pytest.raises(ValueError, match=r"at most 86,400 s; its header claims"):
            media.sampled_frames(total, fps=fps)


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_a_video_without_a_rate_or_frames_is_refused(fps: float) -> None:
    with pytest.raises(ValueError, match="needs frames and a frame rate"):
        media.sampled_frames(10, fps=fps)
    with pytest.raises(ValueError, match="needs frames and a frame rate"):
        media.sampled_frames(0, fps=25.0)


def test_the_pixel_limit_counts_all_frames() -> None:
    media.require_video_pixels(500, 672, 896)
    with pytest.raises(ValueError, match=r"at most 301,056,000 .* \(501 frames of 896x672\)"):
        media.require_video_pixels(501, 672, 896)


ABSURD = (1e9, 1e-9, -1, 0, "2", True, [1], math.nan)


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_wishes_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="video fps must be a number"):
        media.require_video_fps(value)
    if value is not True:
        with pytest.raises(ValueError, match="max_long_side_pixel must be"):
            media.require_long_side(value)
    with pytest.raises(ValueError, match="max_frames must be an integer"):
        media.require_frame_limit(value)


def test_wishes_within_their_ranges() -> None:
    assert [media.require_video_fps(v) for v in (0.2, 2, 5.0)] == [0.2, 2.0, 5.0]
    assert [media.require_frame_limit(v) for v in (1, 768)] == [1, 768]
    assert [media.require_long_side(v) for v in (None, 112, 3584)] == [None, 112, 3584]
    assert media.size_of_long_side(1000, 2000, 448) == (224, 448)
    assert media.size_of_long_side(50, 20, 448) == (56, 28)


def test_join_segments_checks_both_ways() -> None:
    grids = torch.tensor([[4, 8, 10], [2, 8, 10], [1, 4, 4]])
    assert media.join_segments(grids, [6, 1]).tolist() == [[6, 8, 10], [1, 4, 4]]
    for pairs in ([6], [7, 1], [6, 1, 1], [5, 1]):
        with pytest.raises(ValueError, match="grids"):
            media.join_segments(grids, pairs)


def layout(prompt: list[int], **items: list[tuple[Piece, ...]]) -> list[int]:
    images, videos = items.get("images", []), items.get("videos", [])
    # every token is a letter of its own, so that text can be compared
    places = find_places(
        prompt, TOKENS, images=images, videos=videos, decode=lambda ids: "".join(map(chr, ids))
    )
    return lay_out(prompt, places, TOKENS, stamped=lambda before, stamp: [*before, *stamp])


IMAGE = (Piece(count=4),)
VIDEO = (Piece(count=2, stamp=(50, 51)), Piece(count=2, stamp=(52, 53)))
IMAGE_RUN = [3, 1, 1, 1, 1, 4]
VIDEO_RUN = [50, 51, 3, 2, 2, 4, 52, 53, 3, 2, 2, 4]


def test_bare_placeholders_become_runs() -> None:
    prompt = [9, 1, 8, 2, 1]
    ids = layout(prompt, images=[IMAGE, IMAGE], videos=[VIDEO])
    assert ids == [9, *IMAGE_RUN, 8, *VIDEO_RUN, *IMAGE_RUN]
    assert pieces_of(VIDEO_RUN, TOKENS) == VIDEO
    assert pieces_of(IMAGE_RUN, TOKENS) == IMAGE


def test_runs_that_fit_stay_as_they_are() -> None:
    prompt = [9, *IMAGE_RUN, 8, *VIDEO_RUN, 1, 7]
    ids = layout(prompt, images=[IMAGE, IMAGE], videos=[VIDEO])
    assert ids == [9, *IMAGE_RUN, 8, *VIDEO_RUN, *IMAGE_RUN, 7]
    assert layout(ids, images=[IMAGE, IMAGE], videos=[VIDEO]) == ids


@pytest.mark.parametrize(
    "prompt",
    [
        [9, 3, 1, 1, 1, 4],
        [9, 3, 1, 1, 1, 1, 1, 4],
        [9, 3, 1, 1, 1, 1],
        [9, 3, 1, 4],
    ],
)
def test_a_run_of_another_size_is_refused(prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="expanded image of another size than the one sent"):
        layout(prompt, images=[IMAGE])


def test_a_video_of_other_times_is_refused() -> None:
    for change in ({0: 60}, {7: 60}, {9: 1}):
        prompt = [change.get(i, token) for i, token in enumerate(VIDEO_RUN)]
        with pytest.raises(ValueError, match="expanded video of another size"):
            layout(prompt, videos=[VIDEO])


def test_places_and_items_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="more image placeholders in the prompt than images sent"):
        layout([1, 1], images=[IMAGE])
    with pytest.raises(ValueError, match="more videos sent than video placeholders"):
        layout([9], videos=[VIDEO])


def test_pictures_are_upright_over_white_and_scaled() -> None:
    clear = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert media.upright_rgb(clear).getpixel((3, 3)) == (255, 255, 255)
    assert media.upright_rgb(Image.new("LA", (8, 6), (0, 0))).getpixel((3, 3)) == (255,) * 3
    palette = Image.new("P", (8, 6), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.info["transparency"] = 0
    assert media.upright_rgb(palette).getpixel((3, 3)) == (255, 255, 255)
    deep = Image.fromarray(np.full((6, 8), 300, np.uint16))
    assert media.upright_rgb(deep).getpixel((3, 3)) == (1, 1, 1)
    deep = Image.fromarray(np.full((6, 8), 65_535, np.uint16))
    assert media.upright_rgb(deep).getpixel((3, 3)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (8, 6))
    turned.info["exif"] = exif.tobytes()
    assert media.upright_rgb(turned).size == (6, 8)
    assert media.upright_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).mode == "RGB"


def test_counts_that_no_file_can_hold_are_refused() -> None:
    frames = [media_files.jpeg((0, 0, 0), size=(28, 28))] * 3
    whole = media_files.mp4(frames)
    for data in (b"", whole, whole[:99], media_files.avi(frames, claimed=3), b"RIFFxxxxAVI "):
        require_plausible_header(data)
    at = whole.index(b"stts") + 12
    for count in (len(whole) + 1, 2**32 - 1):
        lying = whole[:at] + count.to_bytes(4, "big") + whole[at + 4 :]
        with pytest.raises(ValueError, match=f"claims {count:,} frames in {len(whole):,} bytes"):
            require_plausible_header(lying)
    with pytest.raises(ValueError, match="claims 2,147,483,648 frames"):
        require_plausible_header(media_files.avi(frames, claimed=2**31))
    # sizes of boxes that lie lead nowhere, or to a refusal
    for size in (0, 1, 7, 2**32 - 1):
        for box in (b"moov", b"trak", b"stbl", b"stts"):
            place = whole.index(box) - 4
            with contextlib.suppress(ValueError):
                require_plausible_header(
                    whole[:place] + size.to_bytes(4, "big") + whole[place + 4 :]
                )


def test_frames_larger_than_cinemas_are_refused_from_the_header() -> None:
    """Of MP4, AVI and Matroska, whatever the frames behind the header are; tracks of sound pass."""
    frames = [media_files.jpeg((0, 0, 0), size=(28, 28))] * 2

    def files(size: tuple[int, int]) -> list[bytes]:
        return [
            media_files.mp4(frames, size=size),
            media_files.avi(frames, claimed=2, size=size),
            media_files.mkv(frames, [0, 1], duration=2.0, size=size),
            media_files.mkv(frames, [0, 1], duration=None, size=size),
        ]

    def look(data: bytes) -> None:
        require_plausible_header(data)
        with_times(data)

    for data in files((8192, 4320)):
        look(data)
    for data in files((8192, 4321)):
        with pytest.raises(ValueError, match=r"at most 35,389,440 pixels each .* got 8192x4321"):
            look(data)
    look(media_files.mp4(frames, size=(8192, 4321), handler=b"soun"))
    upside_down = media_files.avi(frames, claimed=2, size=(8192, 4321))
    at = upside_down.index(b"strf") + 16
    upside_down = upside_down[:at] + struct.pack("<i", -4321) + upside_down[at + 4 :]
    with pytest.raises(ValueError, match="got 8192x4321"):
        look(upside_down)
    for cut in range(0, 700, 7):
        for data in files((8192, 4320)):
            look(data[:cut])


def test_what_decoders_raise_is_the_clients_mistake() -> None:
    import zlib

    from PIL import Image

    for kind in (Image.DecompressionBombError, struct.error, zlib.error, SyntaxError, KeyError):
        with pytest.raises(ValueError, match=kind.__name__), reading_media():
            raise kind("x")
    for kind in (ConnectionError, RuntimeError, TimeoutError):
        with pytest.raises(kind), reading_media():
            raise kind
    with pytest.raises(ValueError, match="RuntimeError"), reading_media(RuntimeError):
        raise RuntimeError


def test_bounds_of_areas() -> None:
    most = media.MAX_FRAME_PIXELS
    for wishes in ({}, {"max_pixels": None, "min_pixels": most}, None, [1], {"size": 3}):
        media.require_areas(wishes)
    for value in (0, -1, most + 1, 1e9, "2", True, math.nan):
        for wishes in ({"min_pixels": value}, {"max_pixels": value}):
            with pytest.raises(ValueError, match="_pixels must be an integer from 1 to 35,389,440"):
                media.require_areas(wishes)
        for edge in ("shortest_edge", "longest_edge"):
            with pytest.raises(ValueError, match=rf"size\.{edge} must be"):
                media.require_areas({"size": {edge: value}})
