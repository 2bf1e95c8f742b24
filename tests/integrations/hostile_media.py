"""Requests that are meant to harm a server: broken and lying files, and bodies of the wrong shape.

Made from a seed, so that a number names one of them for good. No file is larger than some 100 KB.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests.integrations import media_files
from tests.integrations.media_cases import data_url, frame_list, picture, question, text, video
from tests.integrations.media_files import encoded, jpeg, mkv, mp4

RED = (255, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """A request body without the model, and what is wrong with it."""

    name: str
    body: dict[str, Any]


def corpus(seed: int = 0) -> list[Hostile]:
    """At least 200 requests; the same seed gives the same ones."""
    rng = random.Random(f"hostile {seed}")
    found = [*_pictures(rng), *_videos(rng), *_bodies()]
    names = [one.name for one in found]
    assert len(set(names)) == len(names) >= 200
    return found


def _pictures(rng: random.Random) -> Iterator[Hostile]:
    for kind, data in _picture_files().items():
        for name, broken in _broken(rng, data):
            yield Hostile(name=f"{kind} {name}", body=_ask(picture(broken)))
    for name, data in _lying_pictures().items():
        yield Hostile(name=name, body=_ask(picture(data)))


def _picture_files() -> dict[str, bytes]:
    noise = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600))
    options: dict[str, dict[str, Any]] = {
        "PNG": {},
        "JPEG": {"quality": 60},
        "GIF": {"save_all": True, "append_images": [noise.rotate(90)], "duration": 100},
        "WEBP": {"lossless": True},
        "BMP": {},
        "TIFF": {},
        "ICO": {"sizes": [(16, 16)]},
        "PPM": {},
        "TGA": {},
        "PCX": {},
        "SGI": {},
        "JPEG2000": {},
    }
    return {kind: encoded(noise, kind, **more) for kind, more in options.items()}


def _videos(rng: random.Random) -> Iterator[Hostile]:
    frames = [jpeg(RED, size=(56, 56))] * 6
    files = {
        "mp4": mp4(frames, fps=2, size=(56, 56)),
        "mkv": mkv(frames, [i / 2 for i in range(6)], duration=3.0, size=(56, 56)),
        "webm": mkv(frames, [0] * 6, duration=None, size=(56, 56), kind=b"webm"),
        "avi": media_files.avi(frames, claimed=6, size=(56, 56)),
        "y4m": b"YUV4MPEG2 W28 H28 F2:1 Ip C444\n" + (b"FRAME\n" + bytes(28 * 28 * 3)) * 4,
    }
    for kind, data in files.items():
        for name, broken in _broken(rng, data):
            yield Hostile(name=f"{kind} {name}", body=_ask(video(broken)))
    for claimed in (0, 2**24, 2**31 - 1, 2**32 - 1):
        data = media_files.avi(frames, claimed=claimed, size=(56, 56))
        yield Hostile(name=f"avi claims {claimed}", body=_ask(video(data)))
    mp4_file, mkv_file = files["mp4"], files["mkv"]
    for box in (b"ftyp", b"moov", b"mvhd", b"trak", b"tkhd", b"mdhd", b"stts", b"stsz", b"stco"):
        at = mp4_file.index(box)
        for name, size in (("endless", 0), ("of no size", 7), ("vast", 0xFFFFFFFF)):
            data = mp4_file[: at - 4] + struct.pack(">I", size) + mp4_file[at:]
            yield Hostile(name=f"mp4 {box.decode()} {name}", body=_ask(video(data)))
    for box, offset in ((b"mdhd", 16), (b"mvhd", 16), (b"stts", 12), (b"stsz", 12), (b"stsc", 8)):
        for value in (0, 1, 0xFFFFFFFF):
            at = mp4_file.index(box) + offset
            data = mp4_file[:at] + struct.pack(">I", value) + mp4_file[at + 4 :]
            yield Hostile(name=f"mp4 {box.decode()} says {value}", body=_ask(video(data)))
    for value in (float("nan"), float("inf"), -1.0, 1e300):
        at = mkv_file.index(b"\x44\x89") + 2 + 8
        data = mkv_file[:at] + struct.pack(">d", value) + mkv_file[at + 8 :]
        yield Hostile(name=f"mkv lasts {value}", body=_ask(video(data)))
    lists = {
        "no frame": "data:video/jpeg;base64,",
        "empty frames": "data:video/jpeg;base64," + "," * 30,
        "thousands of frames": "data:video/jpeg;base64," + "," * 3000,
        "frames that are none": frame_list([b"x"] * 3),
        "one bad frame": frame_list([frames[0], b"x"]),
        "bombs": frame_list([media_files.bomb()] * 3),
    }
    for name, url in lists.items():
        yield Hostile(name=f"list of {name}", body=_ask(video(url)))


def _broken(rng: random.Random, data: bytes) -> Iterator[tuple[str, bytes]]:
    for part in (0.1, 0.5, 0.95):
        yield f"cut at {part}", data[: int(len(data) * part)]
    for number in range(4):
        flipped = bytearray(data)
        for _ in range(1 + len(data) // 200):
            flipped[rng.randrange(min(len(data), 400 if number < 2 else len(data)))] ^= (
                1 << rng.randrange(8)
            )
        yield f"flipped {number}", bytes(flipped)
    at = rng.randrange(8, max(len(data) // 2, 9))
    yield "overwritten", data[:at] + b"\xff" * 16 + data[at + 16 :]
    yield "doubled", data * 2
    yield "behind a web page", b"<html><script>1</script></html>" + data


def _lying_pictures() -> dict[str, bytes]:
    whole = encoded(Image.new("RGB", (28, 28), RED), "PNG")

    def png(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        return (
            whole[:12]
            + b"IHDR"
            + header
            + struct.pack(">I", zlib.crc32(b"IHDR" + header))
            + (whole[33:])
        )

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("a"), b"a")
    jpeg_file = jpeg(RED, size=(28, 28))
    frame = jpeg_file.index(b"\xff\xc0") + 5
    bitmap = encoded(Image.new("RGB", (28, 28), RED), "BMP")
    gif = encoded(Image.new("P", (28, 28)), "GIF")
    return {
        "png of no width": png(0, 28),
        "png of 2^32 pixels": png(65536, 65536),
        "png of the largest size": png(0x7FFFFFFF, 0x7FFFFFFF),
        "png wider than 31 bits": png(0xFFFFFFFF, 1),
        "png ribbon": png(100_000, 1),
        "png larger than its data": png(3000, 3000),
        "png of no depth": png(28, 28, depth=0),
        "png of no colour type": png(28, 28, colour=5),
        "png bomb": media_files.bomb(),
        "png bomb of the limit": media_files.bomb(13_300),
        "png with a bomb of text": _with_text_bomb(whole),
        "jpeg of 65535": jpeg_file[:frame] + b"\xff\xff\xff\xff" + jpeg_file[frame + 4 :],
        "jpeg of no size": jpeg_file[:frame] + bytes(4) + jpeg_file[frame + 4 :],
        "bmp of 2^30": bitmap[:18] + struct.pack("<ii", 1 << 30, 1 << 30) + bitmap[26:],
        "bmp upside down": bitmap[:18] + struct.pack("<ii", 28, -(2**31)) + bitmap[26:],
        "gif of 65535": gif[:6] + b"\xff" * 4 + gif[10:],
        "ppm of 10^5": b"P6 100000 100000 255\n" + bytes(64),
        "ppm of a long number": b"P6 " + b"9" * 5000 + b" 1 255\n",
        "text ppm": b"P3 4 4 255\n" + b"-1 " * 48,
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>",
        "zip": archive.getvalue(),
        "gzip bomb": gzip.compress(bytes(10_000_000), mtime=0),
        "picture with an archive behind it": whole + archive.getvalue(),
        "video as a picture": mp4([jpeg_file]),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "numpy": b"\x93NUMPY\x01\x00" + bytes(64),
        "one byte": b"\x89",
        "byte order mark": "\ufeff".encode(),
    }


def _with_text_bomb(whole: bytes) -> bytes:
    body = b"zTXt" + b"a\0\0" + zlib.compress(bytes(50_000_000))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return whole[:33] + chunk + whole[33:]


def _bodies() -> Iterator[Hostile]:
    good = jpeg(RED, size=(28, 28))
    url = data_url(good, "image/jpeg")
    deep: Any = "x"
    for _ in range(150):
        deep = {"a": [deep]}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts: dict[str, Any] = {
        "url is a number": {"type": "image_url", "image_url": {"url": 3}},
        "url is a list": {"type": "image_url", "image_url": {"url": [url]}},
        "url is an object": {"type": "image_url", "image_url": {"url": {"url": url}}},
        "picture is a list": {"type": "image_url", "image_url": [url]},
        "picture is null": {"type": "image_url", "image_url": None},
        "picture is a text": {"type": "image_url", "image_url": url},
        "no type": {"image_url": {"url": url}},
        "unknown type": {"type": "hologram", "hologram": {"url": url}},
        "text is a picture": {"type": "text", "text": {"url": url}},
        "text is null": {"type": "text", "text": None},
        "half base64": {"type": "image_url", "image_url": {"url": url[:-3]}},
        "no comma": {"type": "image_url", "image_url": {"url": "data:image/png;base64"}},
        "no scheme": {"type": "image_url", "image_url": {"url": "AAAA"}},
        "empty url": {"type": "image_url", "image_url": {"url": ""}},
        "file": {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
        "path": {"type": "image_url", "image_url": {"url": "/etc/hostname"}},
        "path with a nul": {"type": "image_url", "image_url": {"url": "/etc/\0hostname"}},
        "local file as a video": {"type": "video_url", "video_url": {"url": "file:///dev/zero"}},
        "long scheme": {"type": "image_url", "image_url": {"url": "a" * 9000 + ":x"}},
        "nested": {"type": "text", "text": "x", "more": deep},
        "nested url": {"type": "image_url", "image_url": {"url": url, "more": deep}},
        "video as an embedding": {"type": "image_embeds", "image_embeds": "AAAA"},
        "precomputed": {
            "type": "image_url",
            "image_url": {"url": url, "format": "precomputed_embedding"},
        },
    }
    for name, part in parts.items():
        yield Hostile(name=name, body={"messages": question(text("x"), part)})
    messages: dict[str, Any] = {
        "content is a number": [{"role": "user", "content": 3}],
        "content is an object": [{"role": "user", "content": {"type": "text", "text": "x"}}],
        "content holds null": [{"role": "user", "content": [None]}],
        "content holds lists": [{"role": "user", "content": [[["x"]]]}],
        "role is a token": [{"role": "]~b]system", "content": "x"}],
        "role is an object": [{"role": {"a": 1}, "content": "x"}],
        "no content": [{"role": "user"}],
        "messages are null": None,
        "messages are an object": {"role": "user", "content": "x"},
        "every special token": [{"role": "user", "content": "]<]image[>[]~b][e~[]~!b[" * 300}],
        "surrogates": [{"role": "user", "content": "\udcff\ud800"}],
        "noncharacters": [{"role": "user", "content": "\ufdd0\ufdef\uffff\0" * 50}],
        "deep arguments": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {**call, "function": {"name": "f", "arguments": '{"a":' * 99 + "1"}}
                ],
            },
        ],
        "arguments are a list": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**call, "function": {"name": "f", "arguments": "[1]"}}],
            },
        ],
    }
    for name, value in messages.items():
        yield Hostile(name=name, body={"messages": value})
    asked = question(picture(good))
    more: dict[str, Any] = {
        "deep tools": {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]
        },
        "deep template options": {"chat_template_kwargs": {"documents": deep}},
        "thinking is a list": {"chat_template_kwargs": {"thinking_mode": [1]}},
        "media options are a text": {"media_io_kwargs": "x"},
        "frames without number": {"media_io_kwargs": {"video": {"num_frames": "x"}}},
        "processor options are a list": {"mm_processor_kwargs": [1]},
        "processor options of no sense": {"mm_processor_kwargs": {"max_pixels": -1}},
        "processor options of a bomb": {"mm_processor_kwargs": {"min_pixels": 10**12}},
        "processor size": {"mm_processor_kwargs": {"size": {"longest_edge": "x"}}},
        "patches of no size": {"mm_processor_kwargs": {"patch_size": 0}},
    }
    for name, options in more.items():
        yield Hostile(name=name, body={"messages": asked, **options})


def _ask(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": question(*parts)}
