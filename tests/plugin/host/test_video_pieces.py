"""Videos cut into patches a few frames at a time, against transformers' whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
    MiniMaxM3VLVideoProcessor,
)

from m3_plugin.host import video_pieces
from m3_plugin.host.video_pieces import VideosInPieces, frames_of_pairs
from m3_plugin.model.pixels import PixelScale


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


def bytes_of(processor: MiniMaxM3VLVideoProcessor) -> Any:
    """The same, for a model that normalises."""
    served = pieces(processor)
    served.scale = PixelScale.read({})
    return served


def with_room(frames: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """The frames in memory that an odd one more would fit into."""
    order, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if channels_last else ((0, 1, 2, 3),) * 2
    frames = frames.permute(order)
    room = frames.new_empty(frames_of_pairs(len(frames)), *frames.shape[1:])
    room[: len(frames)] = frames
    return room[: len(frames)].permute(back)


@pytest.mark.parametrize("at_once", [1, 60_000, 10**9])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("length", [2, 3, 9, 10])
def test_patches_take_the_memory_of_frames(
    monkeypatch: pytest.MonkeyPatch, length: int, channels_last: bool, at_once: int
) -> None:
    monkeypatch.setattr(video_pieces, "_PIXELS_AT_ONCE", at_once)
    frames = noise(length, 3, 56, 84)
    processor = bytes_of(MiniMaxM3VLVideoProcessor())
    given: dict[str, Any] = {"do_resize": True, "return_tensors": "pt"}
    expected = processor(videos=[frames], **given)
    room = with_room(frames, channels_last=channels_last)
    found = processor(videos=[room], in_place=True, **given)
    assert found["video_grid_thw"].tolist() == expected["video_grid_thw"].tolist()
    assert torch.equal(found["pixel_values_videos"], expected["pixel_values_videos"])
    assert found["pixel_values_videos"].dtype == torch.uint8
    assert found["pixel_values_videos"].data_ptr() == room.data_ptr()


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        # another size, of fewer and of as many pixels
        ([noise(4, 3, 560, 840)], {"max_pixels": 56 * 84}),
        ([noise(4, 3, 42, 112)], {}),
        # no room for the second of an odd pair
        ([noise(3, 3, 56, 84)], {}),
        # parts of something larger
        ([noise(4, 3, 56, 112)[..., :84]], {}),
        ([noise(8, 3, 56, 84)[::2]], {}),
        ([noise(4, 3, 56, 84).float()], {}),
        ([noise(4, 3, 56, 84)], {"image_mean": [0.1, 0.1, 0.1]}),
        ([noise(4, 3, 56, 84), noise(2, 3, 56, 84)], {}),
    ],
)
def test_frames_that_are_no_place_for_patches_stay(
    frames: list[torch.Tensor], options: dict[str, Any]
) -> None:
    before = [video.clone() for video in frames]
    processor = bytes_of(MiniMaxM3VLVideoProcessor())
    given: dict[str, Any] = {"do_resize": True, "return_tensors": "pt", **options}
    found = processor(videos=frames, in_place=True, **given)
    expected = processor(videos=before, **given)
    assert torch.equal(found["pixel_values_videos"], expected["pixel_values_videos"])
    for video, copy in zip(frames, before, strict=True):
        assert torch.equal(video, copy)


def test_frames_stay_unless_asked_for() -> None:
    frames = noise(4, 3, 56, 84)
    before = frames.clone()
    processor = bytes_of(MiniMaxM3VLVideoProcessor())
    processor(videos=[frames], do_resize=True, return_tensors="pt")
    assert torch.equal(frames, before)


def test_a_video_that_grows_beyond_the_limit_is_refused() -> None:
    """By a bound of its area, after whoever loaded it counted its pixels."""
    processor = bytes_of(MiniMaxM3VLVideoProcessor(min_pixels=4_000_000, max_pixels=5_000_000))
    with pytest.raises(ValueError, match=r"at most 301,056,000 .* \(100 frames of "):
        processor(videos=[noise(100, 3, 28, 28)], do_resize=True, return_tensors="pt")
