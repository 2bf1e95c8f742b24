"""What pictures and videos of a request become, for any host: limits, frames, time stamps, tokens.

    image   start, N x image token, end                                N = h * w / 4
    video   per temporal patch (a pair of frames):
            "]<]12.0 seconds[>[" as plain text, start, N x video token, end

with grid (t, h, w) in 14x14 patches. Both use the image's start and end tokens; the vocabulary's
own pair for videos is used by nobody. Time stamps need the frame rate and the frames' indices.

Files come from strangers. What a container says about itself is compared with the limits here
before anything is listed, allocated or decoded for it, and never sizes a loop or a list.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MAX_ASPECT",
    "MAX_FRAMES",
    "MAX_FRAME_PIXELS",
    "MAX_IMAGE_PIXELS",
    "MAX_VIDEO_FPS",
    "MAX_VIDEO_PIXELS",
    "MAX_VIDEO_SECONDS",
    "MIN_VIDEO_FPS",
    "MediaTokens",
    "Piece",
    "Place",
    "find_places",
    "fitted_size",
    "is_16_bit_grey",
    "join_segments",
    "lay_out",
    "modality_error",
    "pieces_of",
    "reading_media",
    "require_areas",
    "require_frame_limit",
    "require_frame_pixels",
    "require_long_side",
    "require_plausible_header",
    "require_video_fps",
    "require_video_pixels",
    "sampled_frames",
    "size_of_long_side",
    "time_stamp",
    "upright_rgb",
    "with_stamp",
]

# Frames of one video that M3 looks at; longer ones are thinned out.
MAX_FRAMES = 768
# MiniMax's service refuses videos of more pixels, counted over all frames after resizing.
MAX_VIDEO_PIXELS = 301_056_000
# No video is longer than a day; what claims to be is a broken or a hostile header.
MAX_VIDEO_SECONDS = 86_400
# Sampling rates that SGLang's own M3 accepts.
MIN_VIDEO_FPS = 0.2
MAX_VIDEO_FPS = 5.0
# Twice what Pillow warns of, which is where Pillow refuses and vLLM's own limit lies.
MAX_IMAGE_PIXELS = 178_956_970
# Frames of cinemas, 8192x4320: decoders hold several frames of some bytes per pixel at a time.
MAX_FRAME_PIXELS = 35_389_440
# Boxes of an MP4 on the way to its tables of times and sizes.
_NESTED_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
# Beyond this aspect ratio transformers refuses an image.
MAX_ASPECT = 200


def modality_error(modality: str) -> ValueError:
    """The error for a kind of media that M3 cannot take."""
    if modality == "audio":
        return ValueError("MiniMax-M3 has no audio tower: send images or videos")
    return ValueError(f"MiniMax-M3 takes images and videos; got {modality!r}")


def require_video_fps(value: Any) -> float:
    """A wish for frames per second, as a number within what M3 is served with.

    Raises
    ------
    ValueError : no number, or outside `MIN_VIDEO_FPS` to `MAX_VIDEO_FPS`.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not MIN_VIDEO_FPS <= value <= MAX_VIDEO_FPS:
        raise ValueError(
            f"video fps must be a number from {MIN_VIDEO_FPS} to {MAX_VIDEO_FPS}; got {value!r}"
        )
    return float(value)


def require_frame_limit(value: Any) -> int:
    """A wish for the most frames of a video, from 1 to `MAX_FRAMES`.

    Raises
    ------
    ValueError : no integer, or outside that range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_FRAMES:
        raise ValueError(f"max_frames must be an integer from 1 to {MAX_FRAMES}; got {value!r}")
    return value


def require_areas(wishes: Any) -> None:
    """Refuse bounds of a picture's or frame's area that make no sense or would fill memory.

    Parameters
    ----------
    wishes : options of transformers' processors; what is no mapping is left to them

    Raises
    ------
    ValueError : a bound that is neither null nor an integer from 1 to `MAX_FRAME_PIXELS`.
    """
    if not isinstance(wishes, Mapping):
        return
    bounds = {name: wishes.get(name) for name in ("min_pixels", "max_pixels")}
    if isinstance(size := wishes.get("size"), Mapping):
        bounds |= {f"size.{edge}": size.get(edge) for edge in ("shortest_edge", "longest_edge")}
    for name, value in bounds.items():
        integer = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (integer and 1 <= value <= MAX_FRAME_PIXELS):
            raise ValueError(
                f"{name} must be an integer from 1 to {MAX_FRAME_PIXELS:,}; got {value!r}"
            )


def require_long_side(value: Any) -> int | None:
    """A wish for the most pixels of the long side; None for none.

    Raises
    ------
    ValueError : no multiple of 28 from 112 to 3,584, the sizes MiniMax's service takes.
    """
    if value is None:
        return None
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or not 112 <= value <= 3584 or value % 28:
        raise ValueError(
            f"max_long_side_pixel must be a multiple of 28 from 112 to 3584; got {value!r}"
        )
    return value


def size_of_long_side(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width, multiples of 28, with a long side of at most `long_side`."""
    scale = min(long_side / max(height, width), 1.0)
    tall, wide = (max(round(side * scale / 28), 1) * 28 for side in (height, width))
    return tall, wide


def require_video_pixels(num_frames: int, height: int, width: int) -> None:
    """Refuse a video of too many pixels; called with its sampled frames at their final size.

    Raises
    ------
    ValueError : more than `MAX_VIDEO_PIXELS` over all frames.
    """
    total = num_frames * height * width
    if total > MAX_VIDEO_PIXELS:
        raise ValueError(
            f"a video must have at most {MAX_VIDEO_PIXELS:,} pixels over all frames; got {total:,} "
            f"({num_frames} frames of {width}x{height}): send fewer or smaller frames"
        )


def require_frame_pixels(height: int, width: int) -> None:
    """Refuse a video by the size of one frame in its file; called before frames are decoded.

    Raises
    ------
    ValueError : more than `MAX_FRAME_PIXELS`.
    """
    if height * width > MAX_FRAME_PIXELS:
        raise ValueError(
            f"a video's frames must have at most {MAX_FRAME_PIXELS:,} pixels each (8192x4320); got "
            f"{width}x{height}: send smaller frames"
        )


def fitted_size(height: int, width: int, *, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width to which transformers resizes a frame, by its area.

    Parameters
    ----------
    factor : both sides become multiples of it
    least, most : bounds of the area

    Raises
    ------
    ValueError : no pixels, or sides further apart than `MAX_ASPECT`.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"a frame's sides must be within a factor of {MAX_ASPECT}; got {width}x{height}"
        )
    tall, wide = (round(side / factor) * factor for side in (height, width))
    if tall * wide > most:
        beta = math.sqrt(height * width / most)
        tall, wide = (
            max(factor, math.floor(side / beta / factor) * factor) for side in (height, width)
        )
    elif tall * wide < least:
        beta = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return tall, wide


def sampled_frames(
    total: int, *, fps: float, wanted_fps: float = 1.0, max_frames: int = MAX_FRAMES
) -> list[int]:
    """Indices of the frames M3 looks at: each the first at least 1/wanted_fps s after the last.

    The last frame is always among them, as in the extraction the model was tuned with; more than
    `max_frames` are thinned out evenly. Takes time and memory of `max_frames`, whatever `total`.

    Parameters
    ----------
    total : frames of the file, as its header or an index of its packets counts them
    fps : frames per second of the file

    Raises
    ------
    ValueError : no frames, no frame rate, or a length beyond `MAX_VIDEO_SECONDS`.
    """
    if total <= 0 or not math.isfinite(fps) or fps <= 0 or wanted_fps <= 0:
        raise ValueError(
            f"a video needs frames and a frame rate; its header says {total} and {fps:g}: write it "
            "anew with its length, e.g. ffmpeg -i FILE -c copy NEW.mp4"
        )
    if total / fps > MAX_VIDEO_SECONDS:
        raise ValueError(
            f"a video must last at most {MAX_VIDEO_SECONDS:,} s; its header claims "
            f"{total / fps:,.0f} s ({total:,} frames at {fps:g} per second)"
        )
    # A little less than the interval: 30 frames at 30.0 fps are one second apart.
    step = max(math.ceil((1.0 / wanted_fps - 1e-4) * fps), 1)
    regular = -(-total // step)
    count = regular + ((regular - 1) * step != total - 1)

    def index(place: int) -> int:
        return place * step if place < regular else total - 1

    if count <= max_frames:
        return [index(place) for place in range(count)]
    if max_frames == 1:
        return [total - 1]
    return [index(round(i * (count - 1) / (max_frames - 1))) for i in range(max_frames)]


def require_plausible_header(data: bytes | mmap) -> None:
    """Refuse a video whose header claims more frames than the file has bytes, or too large ones.

    Decoders size their tables by that count before they look for a frame, and one that cannot have
    the memory ends the process: C++ leaves nothing to catch. MP4, MOV and AVI state such a count.
    Some tell the size of frames only after they have decoded one.

    Raises
    ------
    ValueError : the count or size, and what to send.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        header = _header_of_avi(data)
    else:
        header = _header_of_boxes(data, 0, len(data), depth=0)
    if header.frames > len(data):
        raise ValueError(
            f"a video's header claims {header.frames:,} frames in {len(data):,} bytes; send a "
            "whole file"
        )
    require_frame_pixels(header.height, header.width)


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The largest number of frames that a header claims, and the largest of their sizes."""

    frames: int = 0
    height: int = 0
    width: int = 0

    def __or__(self, other: _Header) -> _Header:
        larger = max(self, other, key=lambda header: header.height * header.width)
        return replace(larger, frames=max(self.frames, other.frames))


def _header_of_avi(data: bytes | mmap) -> _Header:
    """What an AVI's main header, headers of streams and formats of pictures say."""
    # where the count stands behind a chunk's name and size
    fields = ((b"avih", 16), (b"strh", 32))
    found = _Header()
    for name, offset in fields:
        at = data.find(name)
        while at >= 0:
            field = data[at + 8 + offset : at + 12 + offset]
            found |= _Header(frames=int.from_bytes(field, "little"))
            if name == b"strh" and data[at + 8 : at + 12] == b"vids":
                found |= _picture_format(data, data.find(b"strf", at))
            at = data.find(name, at + 4)
    return found


def _picture_format(data: bytes | mmap, at: int) -> _Header:
    """The size of an AVI's pictures by the chunk at `at`; a negative height is upside down."""
    fields = data[at + 12 : at + 20]
    if at < 0 or len(fields) < 8:
        return _Header()
    width, height = struct.unpack("<ii", fields)
    return _Header(height=abs(height), width=abs(width))


def _header_of_boxes(
    data: bytes | mmap, begin: int, end: int, *, depth: int, pictures: bool = True
) -> _Header:
    """What the tables of times and of sample formats of an MP4's tracks say.

    Parameters
    ----------
    depth : boxes around these
    pictures : whether sample formats found here may be those of frames
    """
    found = _Header()
    while begin + 8 <= end:
        size, name = int.from_bytes(data[begin : begin + 4], "big"), data[begin + 4 : begin + 8]
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[begin + 8 : begin + 16], "big"), 16
        # a size of nothing reaches to the end; one that is too small ends what can be read
        stop = end if size == 0 else min(begin + size, end)
        if stop < begin + head:
            break
        if name in _NESTED_BOXES and depth < len(_NESTED_BOXES):
            found |= _header_of_boxes(data, begin + head, stop, depth=depth + 1, pictures=pictures)
        elif name == b"hdlr" and depth == _NESTED_BOXES.index(b"minf"):
            pictures = data[begin + head + 8 : begin + head + 12] == b"vide"
        elif name == b"stts":
            entries = range(begin + head + 8, stop - 7, 8)
            count = sum(int.from_bytes(data[at : at + 4], "big") for at in entries)
            found |= _Header(frames=count)
        elif name == b"stsd" and pictures:
            found |= _sample_size(data[begin + head : min(stop, begin + head + 44)])
        begin = stop
    return found


def _sample_size(entries: bytes) -> _Header:
    """The size of an MP4's frames by the first of its sample formats."""
    sides = entries[40:44]
    if len(sides) < 4:
        return _Header()
    width, height = struct.unpack(">HH", sides)
    return _Header(height=height, width=width)


def time_stamp(
    frame: int, *, fps: float | None, frames_indices: Sequence[int] | None
) -> str | None:
    """The text before the temporal patch that starts with `frame`; None if times are unknown."""
    # Loaders report a rate of 0 for a container without one.
    if not fps or frames_indices is None or len(frames_indices) == 0:
        return None
    return f"]<]{frames_indices[min(frame, len(frames_indices) - 1)] / fps:.1f} seconds[>["


def join_segments(grid_thw: Tensor, pairs: Sequence[int]) -> Tensor:
    """One grid (t, h, w) per video [videos, 3], from one or several per video along time.

    Some transformers releases report each attention segment as a grid of its own; `pairs` holds
    the temporal patches of the whole videos. The rows of pixel values are the same either way.

    Raises
    ------
    ValueError : the grids do not make up the videos, or are more than they.
    """
    segments = iter(grid_thw.tolist())
    joined = []
    for whole in pairs:
        t, h, w = next(segments, (0, 0, 0))
        while 0 < t < whole:
            more, *size = next(segments, (0, 0, 0))
            if size != [h, w]:
                break
            t += more
        if t != whole:
            raise ValueError(f"grids {grid_thw.tolist()} do not make up videos of {pairs} pairs")
        joined.append([t, h, w])
    if next(segments, None) is not None:
        raise ValueError(f"grids {grid_thw.tolist()} are more than videos of {pairs} pairs")
    return torch.tensor(joined, dtype=grid_thw.dtype)


@contextlib.contextmanager
def reading_media(*more: type[Exception]) -> Iterator[None]:
    """What a decoder raises on a stranger's bytes, as the ValueError that hosts answer with 400.

    Pillow, OpenCV and FFmpeg have classes of their own for what they cannot read, and raise others
    by accident. Errors of files and networks pass: they may be the server's.

    Parameters
    ----------
    more : classes that can only come from a decoder where this stands
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (*_decoder_errors(), *more)):
            raise
        raise ValueError(
            f"an image or video cannot be read ({type(error).__name__}: {error}): send it as an "
            "ordinary PNG, JPEG, WebP or MP4 file"
        ) from error


def _decoder_errors() -> tuple[type[Exception], ...]:
    """Classes beyond ValueError and OSError that decoders raise on broken or hostile bytes."""
    from PIL import Image

    found: list[type[Exception]] = [
        Image.DecompressionBombError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        BufferError,
        EOFError,
        LookupError,
        MemoryError,
        SyntaxError,
        struct.error,
        zlib.error,
    ]
    # a decoder that was never imported has raised nothing
    for module, name in (
        ("cv2", "error"),
        ("av.error", "FFmpegError"),
        ("decord._ffi.base", "DECORDError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def upright_rgb(image: Any) -> Any:
    """A Pillow image as a viewer shows it: turned as EXIF says, over white, 8 bits per channel.

    Equal to vLLM's loader to the bit, but for 16-bit greys, which Pillow clips and this scales.
    """
    from PIL import Image, ImageOps

    deep = is_16_bit_grey(image)
    # broken EXIF is no reason to lose the picture
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if deep:
        import numpy as np

        grey = np.asarray(image).astype(np.int64).clip(0, 65_535)
        # 257 takes 65,535 to 255
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        over_white = Image.new("RGB", image.size, (255, 255, 255))
        over_white.paste(image, mask=image.split()[3])
        return over_white
    return image.convert("RGB")


def is_16_bit_grey(image: Any) -> bool:
    """Whether Pillow opened one channel of 16 bits, which its conversion to RGB would clip."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


@dataclass(frozen=True, kw_only=True)
class MediaTokens:
    """The added tokens that images and videos are written with."""

    image: int
    video: int
    start: int
    end: int

    @classmethod
    def of(cls, processor: Any) -> MediaTokens:
        """Read from transformers' `MiniMaxM3VLProcessor`.

        Raises
        ------
        ValueError : the tokenizer lacks one of them.
        """
        ids: dict[str, Any] = {
            "image": processor.image_token_id,
            "video": processor.video_token_id,
            "start": processor.vision_start_token_id,
            "end": processor.vision_end_token_id,
        }
        if missing := [name for name, token in ids.items() if not isinstance(token, int)]:
            raise ValueError(f"the tokenizer lacks MiniMax-M3's tokens for {', '.join(missing)}")
        return cls(**ids)

    def run(self, token: int, count: int) -> list[int]:
        """`count` media tokens between start and end."""
        return [self.start, *[token] * count, self.end]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One picture, or one temporal patch of a video: a run of media tokens, its stamp before it."""

    count: int
    stamp: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a prompt has an item: `begin` to `end`, a bare placeholder or the whole run."""

    begin: int
    end: int
    token: int
    pieces: tuple[Piece, ...]
    expanded: bool


def pieces_of(full: Sequence[int], tokens: MediaTokens) -> tuple[Piece, ...]:
    """The pieces of an item's whole run, stamps included: `lay_out`, read backwards."""
    pieces: list[Piece] = []
    rest = list(full)
    while rest:
        start, end = rest.index(tokens.start), rest.index(tokens.end)
        pieces.append(Piece(count=end - start - 1, stamp=tuple(rest[:start])))
        rest = rest[end + 1 :]
    return tuple(pieces)


def find_places(
    prompt: Sequence[int],
    tokens: MediaTokens,
    *,
    images: Sequence[tuple[Piece, ...]],
    videos: Sequence[tuple[Piece, ...]],
    decode: Callable[[list[int]], str],
) -> list[Place]:
    """Where the items of a request are in its prompt, in order.

    A place is a bare placeholder, or the run that an earlier turn's answer reported: clients that
    keep token ids send pictures already expanded. The first stamp of a video is text that may have
    merged with what is before it, and is compared as text.

    Parameters
    ----------
    images, videos : pieces of each item, from the grids of its pixel values

    Raises
    ------
    ValueError : a run that does not fit its item, or another number of places than of items.
    """
    names = {tokens.image: "image", tokens.video: "video"}
    waiting = {tokens.image: iter(images), tokens.video: iter(videos)}
    places: list[Place] = []
    at = 0
    while at < len(prompt):
        expanded = prompt[at] == tokens.start and at + 1 < len(prompt) and prompt[at + 1] in names
        token = prompt[at + 1] if expanded else prompt[at]
        if token not in names:
            at += 1
            continue
        pieces = next(waiting[token], None)
        if pieces is None:
            raise ValueError(
                f"more {names[token]} placeholders in the prompt than {names[token]}s sent"
            )
        end = _end_of_run(prompt, at, token, pieces, tokens, decode) if expanded else at + 1
        if end is None:
            raise ValueError(
                f"the prompt holds an expanded {names[token]} of another size than the one sent, "
                f"which is {len(pieces)} x {pieces[0].count} tokens between start and end; send "
                "the run as it was, or a single placeholder without start and end"
            )
        places.append(Place(begin=at, end=end, token=token, pieces=pieces, expanded=expanded))
        at = end
    for token, items in waiting.items():
        if next(items, None) is not None:
            raise ValueError(
                f"more {names[token]}s sent than {names[token]} placeholders in the prompt"
            )
    return places


def _end_of_run(
    prompt: Sequence[int],
    at: int,
    token: int,
    pieces: tuple[Piece, ...],
    tokens: MediaTokens,
    decode: Callable[[list[int]], str],
) -> int | None:
    """Where the run that starts `at` ends if it is the whole item, stamps included."""
    first = pieces[0].stamp
    if first:
        # a stamp that merged with the text before it is no longer than what it decodes to
        before = decode(list(prompt[max(at - len(first) - 8, 0) : at]))
        if not before.endswith(decode(list(first))):
            return None
    for number, piece in enumerate(pieces):
        run = [*(piece.stamp if number else ()), *tokens.run(token, piece.count)]
        if list(prompt[at : at + len(run)]) != run:
            return None
        at += len(run)
    return at


def lay_out(
    prompt: Sequence[int],
    places: Sequence[Place],
    tokens: MediaTokens,
    *,
    stamped: Callable[[list[int], Sequence[int]], list[int]],
) -> list[int]:
    """The prompt with every bare placeholder replaced by its item's stamps and tokens.

    Parameters
    ----------
    stamped : what is before a video and its first stamp, as `with_stamp` joins them
    """
    laid: list[int] = []
    done = 0
    for place in places:
        laid += prompt[done : place.begin]
        if place.expanded:
            laid += prompt[place.begin : place.end]
        else:
            laid = stamped(laid, place.pieces[0].stamp)
            for number, piece in enumerate(place.pieces):
                laid += piece.stamp if number else ()
                laid += tokens.run(place.token, piece.count)
        done = place.end
    return laid + list(prompt[done:])


def with_stamp(
    prompt: list[int],
    stamp: Sequence[int],
    *,
    added: Container[int],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> list[int]:
    """A prompt up to a video and its first time stamp, as if they had been tokenized together.

    A stamp is plain text, so the tokenizer may merge its beginning with the text before it ("Look:
    ]<]0.0"), as it does in transformers, which inserts stamps before it tokenizes. All later stamps
    follow an end token, across which nothing merges. Ids that the tokenizer would not produce are
    the caller's choice and stay.

    Parameters
    ----------
    added : ids of the tokenizer's added tokens, across which nothing merges
    encode, decode : the tokenizer's, without adding or leaving out any special token
    """
    begin = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in added), 0)
    text = prompt[begin:]
    if not stamp or not text:
        return [*prompt, *stamp]
    written = decode(text)
    if encode(written) != text:
        return [*prompt, *stamp]
    return prompt[:begin] + encode(written + decode(list(stamp)))
