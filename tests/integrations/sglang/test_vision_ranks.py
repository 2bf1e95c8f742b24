"""`--mm-enable-dp-encoder`: each rank encodes its part of the pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.vision_shares import VisionRanks
from tests.integrations.pixels import normalised
from tests.plugin.model.test_vision_shares import pixels, tower


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Any:
    from m3_sglang.models import minimax_m3

    monkeypatch.setattr(minimax_m3, "tensor_parallel_size", lambda: 2)
    monkeypatch.setattr(minimax_m3, "tensor_parallel_rank", lambda: 1)
    return minimax_m3


@pytest.mark.every_release
@pytest.mark.parametrize("asked", [None, False, True])
def test_ranks_share_only_where_they_are_asked_to(
    second_of_two: Any, monkeypatch: pytest.MonkeyPatch, asked: bool | None
) -> None:
    from sglang.srt import runtime_context

    arguments = SimpleNamespace(mm_enable_dp_encoder=asked)
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: arguments)
    ranks = second_of_two.vision_ranks()
    if not asked:
        assert ranks is None
        return
    assert (ranks.rank, ranks.size) == (1, 2)
    gathered: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(
        second_of_two,
        "tensor_model_parallel_all_gather",
        lambda features, dim: gathered.append((features.shape, dim)),
    )
    ranks.gather(torch.zeros(3, 8))
    assert gathered == [((3, 8), 0)]


def test_features_are_made_by_all_ranks() -> None:
    from m3_sglang.models.minimax_m3 import MiniMaxM3SparseForConditionalGeneration

    model: Any = object.__new__(MiniMaxM3SparseForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.vision_tower, model.vision_ranks = tower(), None
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
    items = [
        SimpleNamespace(feature=pixels([grid]), image_grid_thw=torch.tensor([grid]))
        for grid in grids.tolist()
    ]
    as_bytes = torch.randint(0, 256, items[0].feature.shape, dtype=torch.uint8)
    calls: list[int] = []

    def gather(features: Tensor) -> Tensor:
        calls.append(len(features))
        return features

    with torch.no_grad():
        alone = model.get_image_feature(items)
        model.vision_ranks = VisionRanks(rank=0, size=1, gather=gather)
        shared = model.get_image_feature(items)
        # bytes beside floats are not taken for normalised ones
        model.vision_ranks, model.vision_tower.scale = None, PixelScale.read({})
        items[0].feature = as_bytes
        mixed = model.get_image_feature(items)
        items[0].feature = normalised(as_bytes)
        expected = model.get_image_feature(items)
    assert torch.equal(mixed, expected)
    assert calls == [6 + 8]
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
