"""Videos whose container lacks what decoders count on, made whole before one opens them.

    Matroska, WebM   browsers record without a length and a frame rate: both are taken from the
                     times of the frames that are there
    GIF, WebP        no decoder of videos opens them alike, so Pillow's is used: `Animation`

What is read here is bounded by the bytes of the file and the limits below, never by a claim in it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

from m3_plugin.model.media import reading_media, require_frame_pixels, upright_rgb

__all__ = ["MAX_ANIMATION_PIXELS", "MAX_COUNTED_FRAMES", "Animation", "with_times"]

# Frames that are counted in a file without a length: nine hours at 30 a second.
MAX_COUNTED_FRAMES = 1_000_000
# Pixels of all frames of an animation: every one up to the last that is looked at is decoded.
MAX_ANIMATION_PIXELS = 2_000_000_000

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_INFO, _TRACKS, _CLUSTER = 0x1549A966, 0x1654AE6B, 0x1F43B675
_SEEK_HEAD, _CUES = 0x114D9B74, 0x1C53BB6B
_TIME_SCALE, _DURATION = 0x2AD7B1, 0x4489
_TRACK, _NUMBER, _KIND, _FRAME_TIME = 0xAE, 0xD7, 0x83, 0x23E383
_PICTURES, _WIDTH, _HEIGHT = 0xE0, 0xB0, 0xBA
_CLUSTER_TIME, _SIMPLE_BLOCK, _GROUP, _BLOCK = 0xE7, 0xA3, 0xA0, 0xA1
# Elements whose children are walked like their siblings.
_ENTERED = frozenset({_SEGMENT, _CLUSTER, _GROUP})
_VIDEO = 1
# What an animation's frame without a time is shown for, in ms; browsers do so too.
_DEFAULT_MS = 100


@dataclass(frozen=True)
class _Element:
    """An EBML element: its id, where its head, its body and the next one begin."""

    name: int
    begin: int
    body: int
    end: int


def _elements(
    data: bytes | mmap, begin: int, end: int, *, entered: frozenset[int]
) -> Iterator[_Element]:
    """Elements from `begin` to `end`, and the children of those that are `entered`.

    Ends at what is no element. A size is cut at `end`, so that one that is unknown (all ones) or a
    lie reaches that far.
    """
    while begin < end:
        name_width = _width(data[begin])
        at = begin + name_width
        if not 1 <= name_width <= 4 or at >= end:
            return
        size_width = _width(data[at])
        body = at + size_width
        if not 1 <= size_width <= 8 or body > end:
            return
        size = int.from_bytes(data[at:body], "big") & (1 << 7 * size_width) - 1
        name = int.from_bytes(data[begin:at], "big")
        element = _Element(name, begin, body, min(body + size, end))
        yield element
        begin = body if name in entered else element.end


def _width(first: int) -> int:
    """Bytes of a number of variable width by its first; 9 for none."""
    return 9 - first.bit_length()


def _children(data: bytes | mmap, parent: _Element) -> Iterator[_Element]:
    return _elements(data, parent.body, parent.end, entered=frozenset())


def _number(data: bytes | mmap, element: _Element) -> int:
    return int.from_bytes(data[element.body : min(element.end, element.body + 8)], "big")


@dataclass
class _Matroska:
    """What of a file's head is needed to complete it, and when its frames are shown."""

    segment: _Element | None = None
    info: _Element | None = None
    duration: _Element | None = None
    time_scale: int = 1_000_000
    tracks: _Element | None = None
    track: _Element | None = None
    track_number: int = 0
    frame_time: _Element | None = None
    frames: int = 0
    first: int = 0
    last: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether it says how long it is and how often a frame comes."""
        return self.duration is not None and self.frame_time is not None

    def see_info(self, data: bytes | mmap, info: _Element) -> None:
        self.info = info
        for child in _children(data, info):
            if child.name == _TIME_SCALE:
                self.time_scale = _number(data, child) or self.time_scale
            elif child.name == _DURATION and any(data[child.body : child.end]):
                self.duration = child

    def see_tracks(self, data: bytes | mmap, tracks: _Element) -> None:
        """The first track of pictures."""
        self.tracks = tracks
        for track in _children(data, tracks):
            if track.name != _TRACK:
                continue
            fields = {child.name: child for child in _children(data, track)}
            kind, number = fields.get(_KIND), fields.get(_NUMBER)
            if kind is None or number is None or _number(data, kind) != _VIDEO:
                continue
            self.track, self.track_number = track, _number(data, number)
            if (pictures := fields.get(_PICTURES)) is not None:
                sides = {e.name: _number(data, e) for e in _children(data, pictures)}
                require_frame_pixels(sides.get(_HEIGHT, 0), sides.get(_WIDTH, 0))
            frame_time = fields.get(_FRAME_TIME)
            if frame_time is not None and _number(data, frame_time):
                self.frame_time = frame_time
            return

    def see_block(self, data: bytes | mmap, block: _Element, cluster_time: int) -> None:
        """A frame of some track: its number in variable width, then 16 bits of time."""
        width = _width(data[block.body]) if block.body < block.end else 9
        at = block.body + width
        if width > 8 or at + 2 > block.end:
            return
        number = int.from_bytes(data[block.body : at], "big") & (1 << 7 * width) - 1
        if number != self.track_number:
            return
        time = cluster_time + int.from_bytes(data[at : at + 2], "big", signed=True)
        self.first = min(self.first, time) if self.frames else time
        self.last = max(self.last, time) if self.frames else time
        self.frames += 1
        if self.frames > MAX_COUNTED_FRAMES:
            raise ValueError(
                f"a video without a length in its header must have at most {MAX_COUNTED_FRAMES:,} "
                "frames; write it anew with its length, e.g. ffmpeg -i FILE -c copy NEW.mp4"
            )


def with_times(data: bytes | mmap) -> bytes | None:
    """A Matroska or WebM file with the length and frame rate that its header lacks.

    None for any other file. Both are the mean over the frames that are there, by their times. Cues
    are left out of what is written, since everything behind them moves.

    Raises
    ------
    ValueError : more than `MAX_COUNTED_FRAMES` frames, or larger ones than `MAX_FRAME_PIXELS`.
    """
    if data[:4] != _EBML.to_bytes(4, "big"):
        return None
    seen = _Matroska()
    dropped: list[_Element] = []
    cluster_time = 0
    for element in _elements(data, 0, len(data), entered=_ENTERED):
        name = element.name
        if name == _SEGMENT and seen.segment is None:
            seen.segment = element
        elif name == _INFO and seen.info is None:
            seen.see_info(data, element)
        elif name == _TRACKS and seen.tracks is None:
            seen.see_tracks(data, element)
        elif name in (_SEEK_HEAD, _CUES):
            dropped.append(element)
        elif name == _CLUSTER and seen.is_whole:
            return None
        elif name == _CLUSTER_TIME:
            cluster_time = _number(data, element)
        elif name in (_SIMPLE_BLOCK, _BLOCK):
            seen.see_block(data, element, cluster_time)
    return _completed(data, seen, dropped)


def _completed(data: bytes | mmap, seen: _Matroska, dropped: Sequence[_Element]) -> bytes | None:
    """The file with length and frame rate written into its head, its segment open-ended."""
    segment, info, tracks, track = seen.segment, seen.info, seen.tracks, seen.track
    if segment is None or info is None or tracks is None or track is None or not seen.frames:
        return None
    ticks = _ticks_per_frame(data, seen)
    if not ticks:
        return None
    duration = _written(_DURATION, struct.pack(">d", ticks * seen.frames))
    frame_time = max(round(ticks * seen.time_scale), 1)
    changes = {
        segment: _SEGMENT.to_bytes(4, "big") + b"\x01" + b"\xff" * 7,
        info: _without(data, info, _DURATION, duration),
        tracks: _written(
            _TRACKS,
            data[tracks.body : track.begin]
            + _without(data, track, _FRAME_TIME, _written(_FRAME_TIME, _bytes(frame_time)))
            + data[track.end : tracks.end],
        ),
        **dict.fromkeys(dropped, b""),
    }
    parts: list[bytes] = []
    done = 0
    for element, written in sorted(changes.items(), key=lambda change: change[0].begin):
        parts += [data[done : element.begin], written]
        done = element.body if element is segment else element.end
    return b"".join([*parts, data[done:]])


def _ticks_per_frame(data: bytes | mmap, seen: _Matroska) -> float:
    """Mean time of a frame in the file's ticks; 0 if none can be told."""
    if seen.frames > 1:
        return (seen.last - seen.first) / (seen.frames - 1)
    # one frame lasts as long as the file says that frames do, else a second
    nanoseconds = 10**9 if seen.frame_time is None else _number(data, seen.frame_time)
    return nanoseconds / seen.time_scale


def _without(data: bytes | mmap, parent: _Element, name: int, added: bytes) -> bytes:
    """An element anew, a child of that name replaced by `added` or `added` to it."""
    kept = [
        data[child.begin : child.end] for child in _children(data, parent) if child.name != name
    ]
    return _written(parent.name, b"".join([*kept, added]))


def _written(name: int, body: bytes) -> bytes:
    return _bytes(name) + (len(body) | 1 << 56).to_bytes(8, "big") + body


def _bytes(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


class Animation:
    """An animated GIF or WebP as a video of its mean frame rate, over white.

    Frames are decoded in order, a few at a time.

    Raises
    ------
    ValueError : more than `MAX_ANIMATION_PIXELS`, frames beyond `MAX_FRAME_PIXELS`, or what Pillow
        cannot read.
    """

    def __init__(self, data: bytes) -> None:
        from PIL import Image

        with reading_media(OSError):
            self._image: Any = Image.open(io.BytesIO(data), formats=["GIF", "WEBP"])
            self._total = int(getattr(self._image, "n_frames", 1))
        self.frame_shape = (self._image.height, self._image.width)
        require_frame_pixels(*self.frame_shape)
        pixels = self._total * self._image.height * self._image.width
        if pixels > MAX_ANIMATION_PIXELS:
            raise ValueError(
                f"an animation must have at most {MAX_ANIMATION_PIXELS:,} pixels over all frames; "
                f"got {pixels:,}: send fewer or smaller frames, or an MP4 file"
            )
        milliseconds = 0
        with reading_media(OSError):
            for index in range(self._total):
                self._image.seek(index)
                # WebP's times are known once a frame is loaded
                self._image.load()
                milliseconds += int(self._image.info.get("duration") or _DEFAULT_MS)
        self.avg_fps = 1000.0 * self._total / milliseconds

    @classmethod
    def of(cls, data: bytes | mmap) -> Animation | None:
        """None for any other file."""
        if data[:4] == b"GIF8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            return cls(data[:])
        return None

    def __len__(self) -> int:
        return self._total

    def get_frames_at(self, indices: Sequence[int]) -> np.ndarray:
        """Frames [n, height, width, 3]."""
        frames = []
        with reading_media(OSError):
            for index in indices:
                self._image.seek(index)
                frames.append(np.asarray(upright_rgb(self._image.copy())))
        return np.stack(frames)
