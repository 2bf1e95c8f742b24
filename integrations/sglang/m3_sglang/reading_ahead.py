"""decord, SGLang's decoder where TorchCodec is missing, kept from decoding ahead of who reads.

Whoever asks decord for a frame hands its thread packets of the file until the frame is there, which
are soon all of them. The thread then decodes on, into a queue that nothing bounds: 532 frames of
3840x2160 are 13 GB if whoever resizes them is slower. A seek empties both queues, and nothing is
handed over until the next frame is asked for. It costs that the frames since the last key frame are
decoded once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import dlpack

__all__ = ["StillReader"]

# Pixels of all frames of a file that may wait in the queue.
_MAX_AHEAD = 32_000_000
# From so many frames on between two that are looked at, decord decodes those in between while
# others are resized, and is not ahead.
_SPARSE = 8


class StillReader:
    """A reader of decord that decodes nothing between two calls."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._stand_still()

    @classmethod
    def of(
        cls, decoder: Any, indices: Sequence[int], *, height: int, width: int
    ) -> StillReader | None:
        """None for another decoder, and for a file of which decord may decode ahead.

        Parameters
        ----------
        decoder : SGLang's, whatever is behind it
        indices : of the frames that will be looked at
        height, width : of the file's frames
        """
        reader = getattr(decoder, "_decoder", None)
        if not hasattr(reader, "seek_accurate") or len(decoder) * height * width <= _MAX_AHEAD:
            return None
        # the last frame is looked at wherever it is, so that one distance says nothing
        if indices[-1] - indices[0] >= _SPARSE * (len(indices) - 1):
            return None
        return cls(reader)

    def get_frames_at(self, indices: Sequence[int]) -> Tensor:
        """Frames [n, height, width, 3], in memory that is nobody else's."""
        frames = self._reader.get_batch(indices)
        self._stand_still()
        return dlpack.from_dlpack(frames.to_dlpack())

    def _stand_still(self) -> None:
        # a seek to where a reader is does nothing, and it is behind a frame that it gave
        self._reader.seek(0)
