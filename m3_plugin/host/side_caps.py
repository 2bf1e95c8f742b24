"""transformers' processors of MiniMax-M3 as hosts use them, with MiniMax-M3.1's rule for sizes.

Videos are cut into patches a few frames at a time (`video_pieces`), and pixels stay in 8 bits where
the model normalises them (`byte_pixels`).
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from m3_plugin.host.byte_pixels import BytePictures
from m3_plugin.host.video_pieces import VideosInPieces
from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.resizing import SideCaps, by_pillow

# Settings of a checkpoint's processors that its rule leaves as they are.
_KEPT = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "rescale_factor",
    "temporal_patch_size",
)


@lru_cache(maxsize=4)
def as_served(processor: Any, *, rule: SideCaps | None, scale: PixelScale | None) -> Any:
    """A checkpoint's processor as hosts use it; the same object again for the same one.

    Parameters
    ----------
    processor : transformers' `MiniMaxM3VLProcessor`; it stays as it is
    rule : of `m3_plugin.model.resizing.resize_rule`; None for M3's, which is transformers'
    scale : what the served model normalises bytes with; None if it expects them normalised
    """
    served = copy.copy(processor)
    pictures: Any
    videos: Any
    if rule is None:
        pictures = BytePictures.from_dict(processor.image_processor.to_dict())
        videos = VideosInPieces.from_dict(processor.video_processor.to_dict())
    else:
        pictures = CappedImages(caps=rule, **_kept(processor.image_processor))
        videos = CappedVideos(caps=rule, **_kept(processor.video_processor))
    pictures.scale = videos.scale = scale
    served.image_processor, served.video_processor = pictures, videos
    return served


def _kept(processor: Any) -> dict[str, Any]:
    return {name: getattr(processor, name) for name in _KEPT}


def resized_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [..., 3, height, width] of 8 bits per channel, each resized by Pillow."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:]).to("cpu", torch.uint8).permute(0, 2, 3, 1)
    resized = torch.stack([torch.from_numpy(by_pillow(frame.numpy(), size)) for frame in flat])
    shape = (*frames.shape[:-2], *size)
    return resized.permute(0, 3, 1, 2).reshape(shape).to(frames.device, frames.dtype)


class CappedImages(BytePictures):
    """Sizes pictures by `caps` and leaves the rest to transformers."""

    def __init__(self, *, caps: SideCaps, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.caps = caps

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: list[Tensor], do_resize: bool, **kwargs: Any
    ) -> Any:
        if do_resize:
            images = [resized_frames(image, self.caps.size(*image.shape[-2:])) for image in images]
        return super()._preprocess(images=images, do_resize=False, **kwargs)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict | None = None
    ) -> int:
        tall, wide = self.caps.size(height, width)
        return (tall // self.patch_size) * (wide // self.patch_size)


class CappedVideos(VideosInPieces):
    """Sizes frames by `caps` and leaves the rest to transformers."""

    def __init__(self, *, caps: SideCaps, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.caps = caps

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, videos: list[Tensor], do_resize: bool, **kwargs: Any
    ) -> Any:
        if do_resize:
            videos = [resized_frames(video, self.caps.size(*video.shape[-2:])) for video in videos]
        return super()._preprocess(videos=videos, do_resize=False, **kwargs)

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        tall, wide = self.caps.size(height, width)
        per_frame = (tall // self.patch_size) * (wide // self.patch_size)
        return -(-num_frames // self.temporal_patch_size) * per_frame
