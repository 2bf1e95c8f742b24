"""transformers' video processor, a few frames at a time: the same patches in a third of the memory.

transformers normalises all frames of a video in fp32 and cuts the copy into patches, another copy.
Here each piece of a video is cut as soon as it is normalised, into the place of its patches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
    MiniMaxM3VLVideoProcessor,
)

from m3_plugin.host.byte_pixels import BytePixels

# Pixels of a piece, at least one pair of frames: some 400 MB while it is cut.
_PIXELS_AT_ONCE = 16_000_000


class VideosInPieces(BytePixels, MiniMaxM3VLVideoProcessor):
    """Every video, its frames [n, 3, height, width], is cut in pieces along time."""

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        videos: list[Tensor],
        *,
        temporal_patch_size: int,
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
        patches = [sample["pixel_values_videos"] for sample in samples]
        total = sum(pair * len(rows) for pair, rows in zip(pairs, patches, strict=True))
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
        grids = [
            [pair, *sample["video_grid_thw"][0].tolist()[1:]]
            for pair, sample in zip(pairs, samples, strict=True)
        ]
        return BatchFeature(
            data={
                "pixel_values_videos": values,
                "video_grid_thw": torch.tensor(grids, dtype=torch.long),
            },
            tensor_type=return_tensors,
        )
