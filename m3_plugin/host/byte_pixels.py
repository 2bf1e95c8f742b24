"""transformers' processors of M3, which leave pixels in 8 bits where the model normalises them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.minimax_m3_vl.image_processing_minimax_m3_vl import (
    MiniMaxM3VLImageProcessor,
)

from m3_plugin.model.pixels import PixelScale


class BytePixels:
    """Goes before a processor of transformers; `scale` is what the model normalises with.

    Other settings of a call are met by transformers, in fp32, and so are media of which one has
    no 8 bits per channel: what comes out of one call has one dtype.
    """

    scale: PixelScale | None = None

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
    ) -> Tensor:
        """`images` as they are if the model normalises them; called by transformers."""
        wanted = PixelScale.of(
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
        )
        if self.scale is not None and images.dtype == torch.uint8 and wanted == self.scale:
            return images
        above: Any = super()
        made = above.rescale_and_normalize(
            images, do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
        # who asks for neither means these numbers
        return made if self.scale is None else made.to(torch.float32)

    def _meeting(self, media: Sequence[Tensor]) -> Any:
        """Who prepares these: this processor, or its copy that makes no bytes."""
        if self.scale is None or all(item.dtype == torch.uint8 for item in media):
            return self
        other = copy.copy(self)
        other.scale = None
        return other


class BytePictures(BytePixels, MiniMaxM3VLImageProcessor):
    """Pictures in 8 bits."""

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: list[Tensor], **kwargs: Any
    ) -> Any:
        meeting = self._meeting(images)
        if meeting is not self:
            return meeting._preprocess(images=images, **kwargs)
        return super()._preprocess(images=images, **kwargs)
