"""Picture and video files made byte by byte, so that no encoder is needed and headers can lie."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

JPEG = b"jpeg"
# Rows of the display matrix, as in tkhd: 16.16, 16.16, 2.30.
UPRIGHT = (1, 0, 0, 0, 1, 0)
QUARTER = (0, 1, 0, -1, 0, 0)
# Clockwise turns of the display matrix, in degrees.
TURNED = {
    "0": UPRIGHT,
    "90": QUARTER,
    "180": (-1, 0, 0, 0, -1, 0),
    "270": (0, -1, 0, 1, 0, 0),
}


def jpeg(colour: tuple[int, int, int], *, size: tuple[int, int] = (112, 84)) -> bytes:
    """One frame of one colour; size is width, height."""
    return encoded(Image.new("RGB", size, colour), "JPEG", quality=95)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return data.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A PNG of 1 bit per pixel whose header claims side x side, with hardly any data."""
    rows = zlib.compress(bytes(side // 8 + 1) * 64)
    return _png(side, colour_type=0, parts=[(b"IDAT", rows)])


def _png(side: int, *, colour_type: int, parts: Sequence[tuple[bytes, bytes]]) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 1, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), *parts, (b"IEND", b""))
    )


def flat_png(side: int, colour: tuple[int, int, int]) -> bytes:
    """A square PNG of one colour, as large as wanted: 1 bit per pixel, into a palette."""
    rows = zlib.compress(bytes(side // 8 + 1) * side)
    return _png(side, colour_type=3, parts=[(b"PLTE", bytes(colour) * 2), (b"IDAT", rows)])


def mkv(
    frames: Sequence[bytes],
    seconds: Sequence[float],
    *,
    duration: float | None,
    size: tuple[int, int] = (112, 84),
    fps: float = 1.0,
    kind: bytes = b"matroska",
) -> bytes:
    """Matroska of JPEG frames at the given times, with cues; `duration` is what it claims."""
    info = _element(0x2AD7B1, _uint(1_000_000))
    if duration is not None:
        info += _element(0x4489, struct.pack(">d", duration * 1000))
    info += _element(0x4D80, b"m3") + _element(0x5741, b"m3")
    video = _element(0xB0, _uint(size[0])) + _element(0xBA, _uint(size[1]))
    track = (
        _element(0xD7, _uint(1))
        + _element(0x73C5, _uint(1))
        + _element(0x83, _uint(1))
        + _element(0x23E383, _uint(round(1e9 / fps)))
        + _element(0x86, b"V_MJPEG")
        + _element(0xE0, video)
    )
    head = _element(0x1549A966, info) + _element(0x1654AE6B, _element(0xAE, track))
    clusters = [
        _element(
            0x1F43B675,
            _element(0xE7, _uint(round(time * 1000))) + _element(0xA3, b"\x81\x00\x00\x80" + frame),
        )
        for frame, time in zip(frames, seconds, strict=True)
    ]
    # cues have fixed widths, so that their own size is known before the positions are
    width = len(_cues([0.0] * len(frames), [0] * len(frames)))
    positions, at = [], len(head) + width
    for cluster in clusters:
        positions.append(at)
        at += len(cluster)
    body = head + _cues(seconds, positions) + b"".join(clusters)
    ebml = (
        _element(0x4286, _uint(1))
        + _element(0x42F7, _uint(1))
        + _element(0x42F2, _uint(4))
        + _element(0x42F3, _uint(8))
        + _element(0x4282, kind)
        + _element(0x4287, _uint(4))
        + _element(0x4285, _uint(2))
    )
    return _element(0x1A45DFA3, ebml) + _element(0x18538067, body)


def _cues(seconds: Sequence[float], positions: Sequence[int]) -> bytes:
    points = [
        _element(
            0xBB,
            _element(0xB3, _uint(round(time * 1000), 8))
            + _element(0xB7, _element(0xF7, _uint(1)) + _element(0xF1, _uint(position, 8))),
        )
        for time, position in zip(seconds, positions, strict=True)
    ]
    return _element(0x1C53BB6B, b"".join(points))


def _element(number: int, body: bytes) -> bytes:
    name = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return name + (len(body) | 1 << 56).to_bytes(8, "big") + body


def _uint(value: int, width: int = 0) -> bytes:
    return value.to_bytes(width or max((value.bit_length() + 7) // 8, 1), "big")


def mp4(
    frames: Sequence[bytes],
    *,
    fps: int = 1,
    size: tuple[int, int] = (112, 84),
    matrix: Sequence[int] = UPRIGHT,
    handler: bytes = b"vide",
) -> bytes:
    """MP4 of JPEG frames of equal length in time; `matrix` turns them, as phones do."""
    width, height = size
    total = len(frames)
    a, b, c, d, e, f = (value << 16 for value in matrix)
    turned = struct.pack(">9i", a, b, 0, d, e, 0, 0, 0, 1 << 30)
    assert (c, f) == (0, 0)
    sample = _box(
        JPEG,
        bytes(6)
        + struct.pack(">H", 1)
        + bytes(16)
        + struct.pack(">HHIIIH", width, height, 72 << 16, 72 << 16, 0, 1)
        + bytes(32)
        + struct.pack(">Hh", 24, -1),
    )
    head = _box(b"ftyp", b"isom" + struct.pack(">I", 512) + b"isomiso2mp41")

    def tables(first: int) -> bytes:
        sizes = b"".join(struct.pack(">I", len(frame)) for frame in frames)
        parts = (
            _box(b"stsd", struct.pack(">II", 0, 1) + sample),
            _box(b"stts", struct.pack(">IIII", 0, 1, total, 1)),
            _box(b"stsc", struct.pack(">IIIII", 0, 1, 1, total, 1)),
            _box(b"stsz", struct.pack(">III", 0, 0, total) + sizes),
            _box(b"stco", struct.pack(">III", 0, 1, first)),
        )
        return _box(b"stbl", b"".join(parts))

    def moov(first: int) -> bytes:
        url = _box(b"url ", struct.pack(">I", 1))
        media = _box(b"vmhd", struct.pack(">IQ", 1, 0)) + _box(
            b"dinf", _box(b"dref", struct.pack(">II", 0, 1) + url)
        )
        track = _box(
            b"tkhd",
            struct.pack(">IIIIII", 3, 0, 0, 1, 0, total)
            + bytes(16)
            + turned
            + struct.pack(">II", width << 16, height << 16),
        ) + _box(
            b"mdia",
            _box(b"mdhd", struct.pack(">IIIIIHH", 0, 0, 0, fps, total, 0x55C4, 0))
            + _box(b"hdlr", struct.pack(">II", 0, 0) + handler + bytes(12) + b"m3\0")
            + _box(b"minf", media + tables(first)),
        )
        identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
        movie = _box(
            b"mvhd",
            struct.pack(">IIIIIIH", 0, 0, 0, fps, total, 1 << 16, 1 << 8)
            + bytes(10)
            + identity
            + bytes(24)
            + struct.pack(">I", 2),
        )
        return _box(b"moov", movie + _box(b"trak", track))

    first = len(head) + len(moov(0)) + 8
    return head + moov(first) + _box(b"mdat", b"".join(frames))


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + name + body


def avi(frames: Sequence[bytes], *, claimed: int, size: tuple[int, int] = (112, 84)) -> bytes:
    """AVI of JPEG frames, one a second, whose headers claim another number of them."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    def group(name: bytes, *chunks: bytes) -> bytes:
        return chunk(b"LIST", name + b"".join(chunks))

    width, height = size
    main = struct.pack("<14I", 10**6, 0, 0, 16, claimed, 0, 1, 0, width, height, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<10I", 0, 0, 0, 1, 1, 0, claimed, 0, 0, 0) + bytes(8)
    picture = struct.pack("<IiiHH4s5I", 40, width, height, 1, 24, b"MJPG", *[0] * 5)
    header = group(
        b"hdrl",
        chunk(b"avih", main),
        group(b"strl", chunk(b"strh", stream), chunk(b"strf", picture)),
    )
    movie = group(b"movi", *(chunk(b"00dc", frame) for frame in frames))
    return chunk(b"RIFF", b"AVI " + header + movie)


def endless_mkv() -> bytes:
    """Some 70 KB whose header and last cue claim 3,000,000 s, as does a seek to the end."""
    frames = [jpeg((255, 0, 0))] * 81
    times = [0.5 * i for i in range(40)] + [3e6 - 41 + i for i in range(41)]
    return mkv(frames, times, duration=3e6)


def turned_video(matrix: str) -> bytes:
    """MP4 of two frames whose four corners are told apart, turned by `TURNED[matrix]`."""
    image = Image.new("RGB", (112, 56))
    for colour, corner in zip(_CORNERS, ((0, 0), (56, 0), (56, 28), (0, 28)), strict=True):
        image.paste(colour, (*corner, corner[0] + 56, corner[1] + 28))
    frame = encoded(image, "JPEG", quality=95)
    return mp4([frame] * 2, size=(112, 56), matrix=TURNED[matrix])


# Clockwise from the top left.
_CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


def require_upright(frame: np.ndarray, matrix: str) -> None:
    """The frame [height, width, 3] of `turned_video(matrix)` is turned as a player turns it."""
    turns = int(matrix) // 90
    height, width = frame.shape[:2]
    assert (height, width) == ((56, 112), (112, 56))[turns % 2]
    corners = [frame[y, x] for y, x in ((5, 5), (5, -5), (-5, -5), (-5, 5))]
    # a clockwise turn takes each corner to the next place
    expected = _CORNERS[-turns:] + _CORNERS[:-turns] if turns else _CORNERS
    assert np.abs(np.array(corners, int) - np.array(expected)).max() < 40
