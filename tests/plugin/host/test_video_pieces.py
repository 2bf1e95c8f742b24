"""Videos cut into patches a few frames at a time, against transformers' whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
    MiniMaxM3VLVideoProcessor,
)

from m3_plugin.host import video_pieces
from m3_plugin.host.video_pieces import VideosInPieces


def pieces(processor: MiniMaxM3VLVideoProcessor) -> Any:
    """A video processor of the same settings, as hosts use it."""
    return VideosInPieces.from_dict(processor.to_dict())


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("at_once", [1, 60_000, 10**9])
@pytest.mark.parametrize("lengths", [(1,), (2,), (9,), (5, 1, 4)])
def test_patches_and_grids_are_transformers(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], at_once: int
) -> None:
    """To the bit, whatever the pieces; frames of each video have a size of their own."""
    monkeypatch.setattr(video_pieces, "_PIXELS_AT_ONCE", at_once)
    videos = [noise(n, 3, 60 + 28 * i, 90) for i, n in enumerate(lengths)]
    whole = MiniMaxM3VLVideoProcessor(max_pixels=4000)
    given: dict[str, Any] = {"videos": videos, "do_resize": True, "return_tensors": "pt"}
    ours, theirs = pieces(whole)(**given), whole(**given)
    assert ours["video_grid_thw"].tolist() == theirs["video_grid_thw"].tolist()
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


def test_a_long_video_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_pieces, "_PIXELS_AT_ONCE", 4 * 2 * 56 * 84)
    lengths: list[int] = []
    cut = MiniMaxM3VLVideoProcessor._preprocess

    def counted(self: Any, videos: list[torch.Tensor], **options: Any) -> Any:
        lengths.append(len(videos[0]))
        return cut(self, videos, **options)

    monkeypatch.setattr(MiniMaxM3VLVideoProcessor, "_preprocess", counted)
    VideosInPieces()(videos=[noise(11, 3, 56, 84)], do_resize=True, return_tensors="pt")
    # a pair that is looked at, then pieces of two pairs
    assert lengths == [2, 4, 4, 3]
