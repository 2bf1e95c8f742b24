"""Videos whose container lacks a length, a frame rate, or a decoder."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3_plugin.model import containers
from m3_plugin.model.containers import Animation, with_times
from tests.integrations import media_files
from tests.integrations.media_files import encoded, mkv

FRAME = media_files.jpeg((255, 0, 0), size=(28, 28))
DURATION, FRAME_TIME, VOID = (bytes.fromhex(name) for name in ("4489", "23E383", "23E382"))


def file(seconds: list[float], **options: Any) -> bytes:
    return mkv([FRAME] * len(seconds), seconds, **{"duration": None, "fps": 10.0, **options})


def said(data: bytes | None) -> tuple[float, float]:
    """Length and time of a frame, in seconds, as the head says."""
    assert data is not None
    at = data.index(DURATION) + 10
    (length,) = struct.unpack(">d", data[at : at + 8])
    at = data.index(FRAME_TIME) + 3
    size = data[at + 7]
    return length / 1000, int.from_bytes(data[at + 8 : at + 8 + size], "big") / 1e9


def test_length_and_rate_are_those_of_the_frames() -> None:
    times = [0.0, 0.13, 0.2, 0.33, 0.4]
    for given in (file(times), file(times, kind=b"webm"), file(times).replace(FRAME_TIME, VOID)):
        whole = with_times(given)
        length, interval = said(whole)
        assert whole is not None
        assert (round(length, 3), round(interval, 3)) == (0.5, 0.1)
        assert whole.endswith(given[given.index(bytes.fromhex("1F43B675")) :])
        assert with_times(whole) is None


def test_what_is_whole_or_no_matroska_stays() -> None:
    for data in (file([0, 1], duration=2.0), b"", media_files.mp4([FRAME]), b"\x1a\x45\xdf\xa3"):
        assert with_times(data) is None


def test_open_ended_segments_and_clusters_as_browsers_write_them() -> None:
    """A recorder cannot go back to write a size."""
    data = file([0, 0.1, 0.2])
    for name in ("18538067", "1F43B675"):
        parts = data.split(bytes.fromhex(name))
        data = parts[0] + b"".join(
            bytes.fromhex(name) + b"\x01" + b"\xff" * 7 + part[8:] for part in parts[1:]
        )
    assert round(said(with_times(data))[0], 3) == 0.3


def test_frames_of_other_tracks_are_not_counted() -> None:
    data = file([0, 0.1, 0.2, 0.3])
    sound = data.replace(b"\x81\x00\x00\x80", b"\x82\x00\x00\x80", 2)
    assert round(said(with_times(sound))[0], 3) == 0.2


def test_too_many_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_COUNTED_FRAMES", 2)
    with pytest.raises(ValueError, match="at most 2 frames; write it anew"):
        with_times(file([0, 0.1, 0.2]))


def test_broken_heads_are_left_to_the_decoder() -> None:
    """Ends, and raises nothing, wherever a byte is another one or the file ends."""
    data = file([0, 0.1, 0.2])
    chance = random.Random(0)
    for _ in range(100):
        broken = bytearray(data)
        for at in chance.sample(range(len(data)), 4):
            broken[at] = chance.randrange(256)
        with_times(bytes(broken[: chance.randrange(len(data)) or len(data)]))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations_are_videos(kind: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *more = (Image.new("RGB", (40, 30), colour) for colour in colours)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(
        first, kind, save_all=True, append_images=more, duration=[500, 1000, 1500], **options
    )
    video = Animation.of(data)
    assert video is not None
    assert (len(video), video.avg_fps, video.frame_shape) == (3, 1.0, (30, 40))
    frames = video.get_frames_at([0, 2])
    assert frames.shape == (2, 30, 40, 3)
    assert np.array_equal(frames[:, 0, 0], [colours[0], colours[2]])
    assert Animation.of(encoded(first, "PNG")) is None


def test_animations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (40, 30)), "GIF")
    monkeypatch.setattr(containers, "MAX_ANIMATION_PIXELS", 1000)
    with pytest.raises(ValueError, match="at most 1,000 pixels over all frames; got 1,200"):
        Animation.of(data)
    with pytest.raises(ValueError, match="cannot be read"):
        Animation.of(b"GIF89a" + bytes(9))
