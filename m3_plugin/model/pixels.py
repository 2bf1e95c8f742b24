"""Pixels travel as bytes: whoever encodes them normalises them.

A picture is decoded and resized in 8 bits per channel. transformers then makes fp32 of it, four
times the bytes, which hosts hash, cache and send from process to process. Normalisation is a
function of the byte alone, so it can wait until the vision tower reads its patches: the same
numbers, to the bit.

    (byte - mean / factor) / (deviation / factor)    per channel, in fp32

The constants are the checkpoint's, from its preprocessor_config.json. Who prepares media sends
bytes only if its processor's own settings are these; the tower tells bytes by their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PixelScale"]

# CLIP's, which transformers' processors of M3 take where the file says nothing.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_FACTOR = 1 / 255


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """What rescales and normalises the bytes of a picture, one number per channel."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    factor: float

    @classmethod
    def read(cls, said: Any) -> PixelScale | None:
        """Of a preprocessor_config.json; None if its pixels are not both rescaled and normalised.

        What cannot be read is None too: transformers then says what is wrong with the file.
        """
        if not isinstance(said, Mapping):
            return None
        return cls.of(
            do_rescale=said.get("do_rescale", True),
            rescale_factor=said.get("rescale_factor", _FACTOR),
            do_normalize=said.get("do_normalize", True),
            image_mean=said.get("image_mean", _MEAN),
            image_std=said.get("image_std", _DEVIATION),
        )

    @classmethod
    def of(
        cls,
        *,
        do_rescale: Any,
        rescale_factor: Any,
        do_normalize: Any,
        image_mean: Any,
        image_std: Any,
    ) -> PixelScale | None:
        """Of the settings that a processor of transformers was called with; None as in `read`."""
        if not (do_rescale and do_normalize and isinstance(rescale_factor, float)):
            return None
        if not all(isinstance(numbers, Sequence) for numbers in (image_mean, image_std)):
            return None
        try:
            mean, deviation = (
                tuple(float(number) for number in numbers) for numbers in (image_mean, image_std)
            )
        except (TypeError, ValueError):
            return None
        if len(mean) != len(deviation) or rescale_factor <= 0 or min(deviation, default=0) <= 0:
            return None
        return cls(mean=mean, deviation=deviation, factor=rescale_factor)

    def normalised(self, patches: Tensor) -> Tensor:
        """fp32 of bytes, as transformers' processors compute it.

        patches : uint8 [patches, channels * values of a channel]
        """
        # in the order and the precision of transformers, whose bits these are
        mean, deviation = (
            torch.tensor(numbers, dtype=torch.float32, device="cpu") * (1.0 / self.factor)
            for numbers in (self.mean, self.deviation)
        )
        channels = patches.view(len(patches), len(self.mean), -1).to(torch.float32)
        for constant, apply in ((mean, channels.sub_), (deviation, channels.div_)):
            apply(constant.to(patches.device)[:, None])
        return channels.view(len(patches), -1)
