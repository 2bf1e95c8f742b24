"""transformers' video processor, a few frames at a time: the same patches in less memory.

transformers normalises all frames of a video in fp32 and cuts the copy into patches, another copy.
Here each piece of a video is cut as soon as it is normalised, into the place of its patches. That
place may be the one of its frames: patches in 8 bits are the same bytes in another order, pair of
frames by pair of frames, so that a video that nobody else reads needs no second copy at all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
    MiniMaxM3VLVideoProcessor,
    MiniMaxM3VLVideoProcessorKwargs,
)

from m3_plugin.host.byte_pixels import BytePixels
from m3_plugin.model.media import require_video_pixels

# Pixels of a piece, at least one pair of frames: some 100 MB while it is cut, in fp32.
_PIXELS_AT_ONCE = 4_000_000


class VideoKwargs(MiniMaxM3VLVideoProcessorKwargs, total=False):
    """transformers' settings of a call, and ours."""

    in_place: bool


class VideosInPieces(BytePixels, MiniMaxM3VLVideoProcessor):
    """Every video, its frames [n, 3, height, width], is cut in pieces along time.

    With `in_place` the patches of a single video may take the memory of its frames, which then
    hold nothing of use. It needs `frames_of_pairs` frames of room.
    """

    valid_kwargs = VideoKwargs
    in_place = False

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        videos: list[Tensor],
        *,
        temporal_patch_size: int,
        in_place: bool | None = False,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Patches [all videos' patches, values] and a grid (t, h, w) for each video."""
        meeting = self._meeting(videos)
        if meeting is not self:
            return meeting._preprocess(
                videos,
                temporal_patch_size=temporal_patch_size,
                return_tensors=return_tensors,
                **kwargs,
            )
        cut = partial(super()._preprocess, temporal_patch_size=temporal_patch_size, **kwargs)
        # a pair of frames says how many patches each pair has
        samples = [cut([video[:temporal_patch_size]]) for video in videos]
        pairs = [-(-len(video) // temporal_patch_size) for video in videos]
        grids = [
            [pair, *sample["video_grid_thw"][0].tolist()[1:]]
            for pair, sample in zip(pairs, samples, strict=True)
        ]
        for video, (_, tall, wide) in zip(videos, grids, strict=True):
            require_video_pixels(len(video), tall * self.patch_size, wide * self.patch_size)
        patches = [sample["pixel_values_videos"] for sample in samples]
        total = sum(pair * len(rows) for pair, rows in zip(pairs, patches, strict=True))
        values = None
        if in_place and len(videos) == 1:
            values = _place_of_frames(
                videos[0], patches[0], pairs=pairs[0], pair=temporal_patch_size
            )
        if values is None:
            values = patches[0].new_empty(total, patches[0].shape[1])
        done = 0
        for video, rows in zip(videos, patches, strict=True):
            # of a pair, as it comes and as it leaves
            pixels = (rows.numel() + video[:temporal_patch_size].numel()) // 3
            step = max(_PIXELS_AT_ONCE // pixels, 1) * temporal_patch_size
            for first in range(0, len(video), step):
                piece = cut([video[first : first + step]])["pixel_values_videos"]
                values[done : done + len(piece)] = piece
                done += len(piece)
        return BatchFeature(
            data={
                "pixel_values_videos": values,
                "video_grid_thw": torch.tensor(grids, dtype=torch.long),
            },
            tensor_type=return_tensors,
        )


def frames_of_pairs(num_frames: int) -> int:
    """Frames for which a video cut in place needs room: an odd last one makes a pair by itself."""
    pair = MiniMaxM3VLVideoProcessor.temporal_patch_size
    return -(-num_frames // pair) * pair


def frames_of_patches(patches: Tensor, *, height: int, width: int) -> Tensor:
    """Frames [n, 3, height, width] of which these bytes are the patches, an odd last frame twice.

    Parameters
    ----------
    patches : uint8 of any shape, as `VideosInPieces` cuts a single video
    """
    processor = MiniMaxM3VLVideoProcessor
    pair, merge, side = processor.temporal_patch_size, processor.merge_size, processor.patch_size
    square = merge * side
    shape = (-1, height // square, width // square, merge, merge, 3, pair, side, side)
    # pair, frame, channel, then rows and columns, each of squares, patches and pixels
    ordered = patches.reshape(shape).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return ordered.reshape(-1, 3, height, width)


def _place_of_frames(video: Tensor, sample: Tensor, *, pairs: int, pair: int) -> Tensor | None:
    """The memory of a video's frames as that of its patches; None where these do not fit.

    They do if a pair of frames has as many bytes as its patches, and if the frames lie one after
    the other: no frame is then overwritten before it is read.

    Parameters
    ----------
    video : frames [n, 3, height, width], the channels of a pixel apart or together
    sample : patches of one pair [patches, values]
    pair : frames of a pair
    """
    frame = video[0]
    in_a_row = len(video) == 1 or video.stride(0) == frame.numel()
    dense = frame.is_contiguous() or frame.permute(1, 2, 0).is_contiguous()
    equal = sample.dtype == video.dtype and sample.numel() == pair * frame.numel()
    room = video.untyped_storage().nbytes() // video.element_size() - video.storage_offset()
    if not (in_a_row and dense and equal and room >= pairs * sample.numel()):
        return None
    return video.as_strided((pairs * len(sample), sample.shape[1]), (sample.shape[1], 1))
