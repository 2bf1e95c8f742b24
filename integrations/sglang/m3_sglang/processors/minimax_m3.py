"""Images and videos of a request -> what M3 sees, token for token as transformers prepares it.

SGLang's own processor sizes images by their long side (up to 2,016 pixels); this one runs
transformers' `MiniMaxM3VLProcessor`, which bounds the area, unless a request names a
`max_long_side_pixel`. A prompt given as text goes through it whole, unless it holds pictures that
are expanded already. A prompt given as token ids keeps them, and only its placeholders are
replaced (`m3_plugin.model.media` has the layout). A video that comes as frames has no time stamps.

Decoding, resizing and patches run in threads of their own: SGLang's HTTP server, tokenizer and
streams share one event loop, which must not wait for a video.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import io
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.mm_utils import hash_feature
from sglang.srt.managers.schedule_batch import Modality, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultimodalProcessor,
    MultimodalSpecialTokens,
)
from sglang.srt.utils import common, load_image
from torch import Tensor
from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor

from m3_plugin.host.metrics import count_refused_request
from m3_plugin.host.side_caps import as_served, resized_frames
from m3_plugin.host.video_pieces import frames_of_pairs
from m3_plugin.model.containers import Animation, with_times
from m3_plugin.model.media import (
    MAX_FRAMES,
    MediaTokens,
    Piece,
    find_places,
    fitted_size,
    join_segments,
    lay_out,
    modality_error,
    reading_media,
    require_areas,
    require_frame_limit,
    require_frame_pixels,
    require_long_side,
    require_plausible_header,
    require_video_fps,
    require_video_pixels,
    sampled_frames,
    size_of_long_side,
    time_stamp,
    upright_rgb,
    with_stamp,
)
from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.resizing import SideCaps, require_no_area, resize_rule
from m3_sglang.compat import preprocessor_file, read_config
from m3_sglang.models.minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from m3_sglang.reading_ahead import StillReader

# Requests whose media are prepared at the same time.
_WORKERS = 2
# Pixels that are decoded before they are shrunk, at least one frame.
_PIXELS_AT_ONCE = 8_000_000


class M3Processor(BaseMultimodalProcessor):
    """Loads media with SGLang, prepares them and the prompt with transformers."""

    models: ClassVar = [MiniMaxM3SparseForConditionalGeneration]
    # ids come from our own layout, also for prompts given as ids: SGLang must not lay them out anew
    preserve_processor_input_ids = True
    gpu_image_decode = False
    # the first GPU belongs to the scheduler
    video_preprocessing_device = "cpu"

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        # what SGLang built from the checkpoint sizes images differently; its tokenizer stays
        processor = MiniMaxM3VLProcessor.from_pretrained(
            server_args.model_path, revision=server_args.revision
        )
        processor.tokenizer = getattr(_processor, "tokenizer", processor.tokenizer)
        self.rule = published_rule(hf_config, server_args)
        # a file that is none has ended this by now
        scale = PixelScale.read(preprocessor_file(server_args) or None)
        processor = as_served(processor, rule=self.rule, scale=scale)
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        for wishes in (self.image_config, self.video_config):
            require_areas(wishes)
            if self.rule is not None:
                require_no_area(wishes, option="--mm-process-config")
        self.ids = MediaTokens.of(processor)
        tokens = MultimodalSpecialTokens(
            image_token=processor.IMAGE_TOKEN,
            image_token_id=self.ids.image,
            video_token=processor.VIDEO_TOKEN,
            video_token_id=self.ids.video,
        )
        tokens.build(processor)
        # SGLang's own attribute may be None; this one is not
        self.mm_tokens = self.media_tokens = tokens
        self.video_config = dict(self.video_config)
        self.video_wishes = VideoWishes.of(self.video_config)
        for name in VideoWishes.NAMES:
            self.video_config.pop(name, None)
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="m3-media")
        self._of_thread = threading.local()

    def _own_processor(self) -> Any:
        """This thread's copy of the processor: a tokenizer may not be used by two threads."""
        if not hasattr(self._of_thread, "processor"):
            self._of_thread.processor = copy.deepcopy(self._processor)
        return self._of_thread.processor

    @classmethod
    def _load_single_item(cls, data: Any, modality: Modality, *args: Any, **kwargs: Any) -> Any:
        """Runs in SGLang's threads; pictures as vLLM loads them, and no picture's fault a 500."""
        if modality == Modality.VIDEO:
            if (frames := FrameList.of(data)) is not None:
                return frames
            data = plausible(data)
            if isinstance(data, Animation):
                return data
        if modality != Modality.IMAGE or cls._is_preprocessed_input(data):
            return super()._load_single_item(data, modality, *args, **kwargs)
        try:
            with reading_media():
                image, _ = load_image(data, cls.gpu_image_decode)
                return upright_rgb(image)
        except (ValueError, OSError) as error:
            raise ValueError(f"Failed to load image: {error}") from error

    async def process_mm_data_async(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_data: list | None,
        audio_data: list | None,
        input_text: str | list[int],
        request_obj: Any,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """Everything the scheduler needs to know about a request with media.

        Raises
        ------
        ValueError : audio, media beyond the limits, wishes that cannot be met, or media and
            placeholders that do not match.
        """
        if audio_data:
            count_refused_request("audio")
            raise modality_error("audio")
        video_data = request_obj.video_data
        if any(
            self._is_preprocessed_input(item) for item in [*(image_data or ()), *(video_data or ())]
        ):
            raise ValueError(
                "MiniMax-M3 takes pictures and videos as files or pixels here; processor_output "
                "and precomputed_embedding items are not served by m3-plugin"
            )
        long_sides = [require_long_side(_wish(item, LONG_SIDE)) for item in image_data or ()]
        wishes = [self.video_wishes.with_request(item) for item in video_data or ()]
        processor: Any = self._processor
        loaded = await self.load_mm_data(
            # placeholders are compared with the items later, when their sizes are known
            prompt=processor.IMAGE_TOKEN * len(image_data or ())
            + processor.VIDEO_TOKEN * len(video_data or ()),
            image_data=image_data,
            video_data=video_data,
            multimodal_tokens=self.media_tokens,
        )
        loaded.input_text = input_text if isinstance(input_text, str) else ""
        loaded.input_ids = None if isinstance(input_text, str) else input_text
        items, input_ids = await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(self._prepare, loaded, input_text, long_sides, wishes)
        )
        return MultimodalProcessorOutput(
            input_ids=input_ids.tolist(),
            mm_items=items,
            im_start_id=self.ids.start,
            im_end_id=self.ids.end,
            im_token_id=self.ids.image,
            video_token_id=self.ids.video,
        )

    def _prepare(
        self,
        loaded: Any,
        prompt: str | list[int],
        long_sides: Sequence[int | None],
        wishes: Sequence[VideoWishes],
    ) -> tuple[list[Any], Tensor]:
        """Items and token ids of a request whose media are loaded; in one of our threads."""
        if all(isinstance(image, Image.Image) for image in loaded.images):
            loaded.images = [
                with_long_side(image, side)
                for image, side in zip(loaded.images, long_sides, strict=True)
            ]
        with reading_media(RuntimeError):
            videos = [
                video_frames(video, wish=wish, resize=self._frame_size, by=self._resized)
                for video, wish in zip(loaded.videos or (), wishes, strict=True)
            ]
        # frames of files are ours, and nobody reads them after their patches
        in_place = not any(is_frames(video) for video in loaded.videos or ())
        loaded.videos = [frames for frames, _ in videos]
        items, input_ids, _ = self.process_and_combine_mm_data(
            loaded,
            self.media_tokens,
            video_metadata=[metadata for _, metadata in videos],
            in_place=in_place,
            prompt=prompt,
        )
        for item in items:
            item.set_hash(identity(item))
        return items, input_ids

    def _frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that transformers gives a frame with this server's settings."""
        if not self.video_config.get("do_resize", True):
            return height, width
        if self.rule is not None:
            return self.rule.size(height, width)
        video: Any = self._processor.video_processor
        return fitted_size(
            height,
            width,
            factor=video.patch_size * video.merge_size,
            least=self.video_config.get("min_pixels") or video.min_pixels,
            most=self.video_config.get("max_pixels") or video.max_pixels,
        )

    def _resized(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        """Frames of the size that `_frame_size` said, as this server's processor resizes them."""
        return resized(frames, size) if self.rule is None else resized_frames(frames, size)

    def process_mm_data(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_text: str,
        images: list | None = None,
        videos: list | None = None,
        audios: list | None = None,
        *,
        video_metadata: Sequence[dict[str, Any]] = (),
        in_place: bool = False,
        prompt: str | list[int],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Called back by SGLang with the media it loaded; returns ids, pixel values and grids.

        With `in_place`, patches of a video may take the memory of its frames.
        """
        processor: Any = self._own_processor()
        media: dict[str, Any] = {}
        if images:
            media |= {"images": images, "images_kwargs": dict(self.image_config)}
        if videos:
            # transformers takes frame sizes that are multiples of 28 only, unless it resizes them
            video_kwargs = {
                "do_resize": True,
                "do_sample_frames": False,
                **self.video_config,
                "in_place": in_place,
            }
            media |= {
                "videos": videos,
                "video_metadata": list(video_metadata),
                "videos_kwargs": video_kwargs,
            }
        # for ids, a text of placeholders only: pixel values do not depend on the prompt
        whole = isinstance(prompt, str) and (
            processor.VISION_START_TOKEN not in prompt
            and prompt.count(processor.IMAGE_TOKEN) == len(images or ())
            and prompt.count(processor.VIDEO_TOKEN) == len(videos or ())
        )
        text = (
            prompt
            if whole
            else processor.IMAGE_TOKEN * len(images or ())
            + processor.VIDEO_TOKEN * len(videos or ())
        )
        result = dict(processor(text=[text], return_tensors="pt", **media))
        if videos:
            pairs = [-(-len(frames) // _pair(processor)) for frames in videos]
            result["video_grid_thw"] = join_segments(result["video_grid_thw"], pairs)
        if not whole:
            ids = processor.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            result["input_ids"] = torch.tensor([self._lay_out(ids, result, video_metadata)])
        return {
            name: result[name]
            for name in (
                "input_ids",
                "pixel_values",
                "image_grid_thw",
                "pixel_values_videos",
                "video_grid_thw",
            )
            if name in result
        }

    def _lay_out(
        self, prompt: list[int], result: dict[str, Any], video_metadata: Sequence[dict[str, Any]]
    ) -> list[int]:
        """Replace each placeholder of a prompt given as ids by the tokens of its item."""
        processor = self._own_processor()
        merge_length = processor.image_processor.merge_size**2
        encode = partial(processor.tokenizer.encode, add_special_tokens=False)
        decode = partial(processor.tokenizer.decode, skip_special_tokens=False)
        images = result.get("image_grid_thw", torch.empty(0, 3)).tolist()
        videos = result.get("video_grid_thw", torch.empty(0, 3)).tolist()
        places = find_places(
            prompt,
            self.ids,
            images=[(Piece(count=int(t * h * w) // merge_length),) for t, h, w in images],
            videos=[
                tuple(
                    Piece(
                        count=h * w // merge_length,
                        stamp=tuple(encode(stamp_of(pair * _pair(processor), metadata) or "")),
                    )
                    for pair in range(t)
                )
                for (t, h, w), metadata in zip(videos, video_metadata, strict=True)
            ],
            decode=decode,
        )
        added = frozenset(processor.tokenizer.get_added_vocab().values())
        stamped = partial(with_stamp, added=added, encode=encode, decode=decode)
        return lay_out(prompt, places, self.ids, stamped=stamped)


def identity(item: Any) -> int:
    """What SGLang's caches of features and prefixes know an item by: its patches and their grid.

    SGLang would take the patches alone, which are the same for two shapes of few colours.
    """
    grid = getattr(item, f"{item.modality.name.lower()}_grid_thw")
    words = f"{item.modality.name} {grid.tolist()} {hash_feature(item.feature)}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def published_rule(hf_config: Any, server_args: Any) -> SideCaps | None:
    """How a checkpoint's pictures and frames get their size; None for M3's rule.

    Raises
    ------
    ValueError : it names a rule that is not its model's.
    """
    return resize_rule(preprocessor_file(server_args), read_config(hf_config))


def plausible(data: Any) -> Any:
    """A video whose header neither lies to the decoder nor lacks what it needs.

    An `Animation`, the bytes of a file, or what was given if it is no file or one that may stay
    where it is.

    Raises
    ------
    ValueError : it cannot be fetched or decoded from base64, or claims what it cannot hold.
    """
    url = getattr(data, "url", data)
    if not isinstance(url, (str, bytes)):
        return data
    fetch = getattr(common, "_normalize_video_input", None)
    # what an older release fetches is not seen before its decoder opens it
    if fetch is None:
        return data
    try:
        source = fetch(url)
        # a device or a pipe has no end
        if isinstance(source, str) and os.path.isfile(source) and os.path.getsize(source):
            with (
                open(source, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            ):
                return _whole(mapped) or data
    except OSError as error:
        raise ValueError(f"Failed to load video: {error}") from error
    return _whole(source) or source if isinstance(source, bytes) else data


def _whole(file: bytes | mmap.mmap) -> Animation | bytes | None:
    """What is opened in the place of a file; None if the file itself is."""
    require_plausible_header(file)
    return Animation.of(file) or with_times(file)


class FrameList:
    """A video sent as `data:video/jpeg;base64,FRAME,FRAME,...`, decoded a few frames at a time.

    As vLLM takes it: every frame is looked at, and `fps` says how many were a second.

    Raises
    ------
    ValueError : more than `MAX_FRAMES`, not base64, no pictures, or pictures of several sizes.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        if len(parts) > MAX_FRAMES:
            raise ValueError(f"a list of frames holds at most {MAX_FRAMES}; got {len(parts)}")
        self._parts = parts
        self.frame_shape = self.get_frames_at([0]).shape[1:3]

    @classmethod
    def of(cls, data: Any) -> FrameList | None:
        """None for any other video."""
        url = getattr(data, "url", data)
        if not isinstance(url, str) or url[:15].lower() != "data:video/jpeg":
            return None
        return cls(url.partition(",")[2].split(","))

    def __len__(self) -> int:
        return len(self._parts)

    def get_frames_at(self, indices: Sequence[int]) -> np.ndarray:
        """Frames [n, height, width, 3]."""
        with reading_media(OSError):
            files = [base64.b64decode(self._parts[index], validate=True) for index in indices]
            images = [np.asarray(upright_rgb(Image.open(io.BytesIO(file)))) for file in files]
        if len({image.shape for image in images}) != 1:
            raise ValueError("the frames of a video must be of one size")
        return np.stack(images)


LONG_SIDE = "max_long_side_pixel"


@dataclass(frozen=True, kw_only=True)
class VideoWishes:
    """How densely a video is sampled, and the long side of its frames if a request bounds it."""

    NAMES: ClassVar = ("fps", "max_frames")

    fps: float = 1.0
    max_frames: int = MAX_FRAMES
    long_side: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VideoWishes:
        """The server's, from `video` of `--mm-process-config`.

        Raises
        ------
        ValueError : a value outside its range.
        """
        return cls().changed(config)

    def changed(self, wishes: Mapping[str, Any]) -> VideoWishes:
        """The same with other wishes, as far as there are any.

        Raises
        ------
        ValueError : a value outside its range.
        """
        fps, most = wishes.get("fps"), wishes.get("max_frames")
        return VideoWishes(
            fps=self.fps if fps is None else require_video_fps(fps),
            max_frames=self.max_frames if most is None else require_frame_limit(most),
            long_side=require_long_side(wishes.get(LONG_SIDE)) or self.long_side,
        )

    def with_request(self, item: Any) -> VideoWishes:
        """Those of one video of a request, which stand beside its URL."""
        names = (*self.NAMES, LONG_SIDE)
        return self.changed({name: _wish(item, name) for name in names})


def _wish(item: Any, name: str) -> Any:
    """An option of one item: a key of a mapping, or what SGLang's parser made of it."""
    holder = item if isinstance(item, Mapping) else None
    value = holder.get(name) if holder is not None else getattr(item, name, None)
    if value is not None:
        return value
    extra = (
        holder.get("preprocess_kwargs")
        if holder is not None
        else getattr(item, "preprocess_kwargs", None)
    )
    return extra.get(name) if isinstance(extra, Mapping) else None


def _pair(processor: Any) -> int:
    return processor.video_processor.temporal_patch_size


def stamp_of(frame: int, metadata: Mapping[str, Any]) -> str | None:
    """The text before the temporal patch that starts with `frame`; None if times are unknown."""
    return time_stamp(frame, fps=metadata.get("fps"), frames_indices=metadata.get("frames_indices"))


def with_long_side(image: Image.Image, long_side: int | None) -> Image.Image:
    """The picture with a long side of at most `long_side` pixels, as it is without one."""
    if long_side is None:
        return image
    height, width = size_of_long_side(image.height, image.width, long_side)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def video_frames(
    video: Any,
    *,
    wish: VideoWishes | None = None,
    resize: Callable[[int, int], tuple[int, int]] | None = None,
    by: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Frames [n, channels, height, width] of a loaded video, and when they were shown.

    Frames of a file are decoded and resized a few at a time; its header decides before anything is
    decoded whether it is within `MAX_VIDEO_PIXELS`.

    Parameters
    ----------
    video : SGLang's decoder, or frames: a tensor [n, channels, height, width], an array
        [n, height, width, channels], or a list of pictures or arrays of one size
    wish : sampling of a file; frames are taken as they are
    resize : height and width of a frame from those of the file; None keeps them
    by : brings frames to that size; None for transformers' way
    """
    wish, by = wish or VideoWishes(), by or resized
    frames = as_frames(video)

    def size(height: int, width: int) -> tuple[int, int]:
        if wish.long_side is not None:
            height, width = size_of_long_side(height, width, wish.long_side)
        return resize(height, width) if resize is not None else (height, width)

    if frames is not None:
        target = size(*frames.shape[-2:])
        require_video_pixels(len(frames), *target)
        return by(frames, target), {
            "total_num_frames": len(frames),
            "fps": None,
            "frames_indices": None,
        }
    decoder: Any = video
    total = len(decoder)
    if isinstance(video, FrameList):
        rate, indices = wish.fps, list(range(total))
    else:
        rate = decoder.avg_fps
        indices = sampled_frames(
            total, fps=rate or 0.0, wanted_fps=wish.fps, max_frames=wish.max_frames
        )
    height, width = getattr(decoder, "frame_shape", None) or decoder[0].shape[:2]
    require_frame_pixels(height, width)
    require_video_pixels(len(indices), *size(height, width))
    decoder = StillReader.of(decoder, indices, height=height, width=width) or decoder
    at_once = max(_PIXELS_AT_ONCE // (height * width), 1)
    frames = None
    for first in range(0, len(indices), at_once):
        # not as a tensor, for which SGLang pins memory even where there is no accelerator
        part = torch.as_tensor(decoder.get_frames_at(indices[first : first + at_once]))
        part = part.permute(0, 3, 1, 2)
        # what is decoded may be turned against what the header says
        part = by(part, size(*part.shape[-2:]))
        if frames is None:
            # with room to be cut in place
            frames = part.new_empty(frames_of_pairs(len(indices)), *part.shape[1:])
            frames = frames[: len(indices)]
        if part.shape[1:] != frames.shape[1:]:
            raise ValueError("the frames of a video must be of one size")
        frames[first : first + at_once] = part
    assert frames is not None
    return frames, {"total_num_frames": total, "fps": rate, "frames_indices": indices}


def is_frames(video: Any) -> bool:
    """Whether a video came as frames, which are their sender's."""
    return isinstance(video, (list, tuple, np.ndarray, torch.Tensor))


def as_frames(video: Any) -> Tensor | None:
    """Frames [n, channels, height, width] of a video that came as frames; None for a decoder.

    Raises
    ------
    ValueError : no frames, frames of several sizes, or not three colours.
    """
    if isinstance(video, (list, tuple)):
        arrays = [np.asarray(frame) for frame in video]
        if not arrays or len({array.shape for array in arrays}) != 1:
            raise ValueError("a video given as frames needs at least one, all of one size")
        video = np.stack(arrays)
    if isinstance(video, np.ndarray):
        if video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(
                f"frames as arrays must be [n, height, width, 3]; got {list(video.shape)}"
            )
        video = torch.from_numpy(video).permute(0, 3, 1, 2)
    if not isinstance(video, torch.Tensor):
        return None
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(
            f"frames as a tensor must be [n, 3, height, width]; got {list(video.shape)}"
        )
    return video


def resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [n, channels, height, width] of another size, equal to transformers' to the bit."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    from torchvision.transforms.v2 import functional

    return functional.resize(
        frames, list(size), interpolation=functional.InterpolationMode.BICUBIC, antialias=True
    )
