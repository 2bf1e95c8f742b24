"""`--mm-encoder-tp-mode data`: each rank encodes its part of the pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config.multimodal import MultiModalConfig
from vllm.model_executor.models.interfaces import supports_multimodal_encoder_tp_data

from m3_plugin.model.vision_shares import VisionRanks
from m3_vllm import media
from m3_vllm.media import vision_ranks
from m3_vllm.model import M3ForConditionalGeneration
from tests.plugin.model.test_vision_shares import pixels, tower


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(media, "get_tensor_model_parallel_rank", lambda: 1)


def config(mode: Any) -> Any:
    multimodal = MultiModalConfig(mm_encoder_tp_mode=mode)
    return SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal))


def test_vllm_believes_in_the_flag() -> None:
    """Otherwise it falls back to the other mode, with a warning."""
    assert supports_multimodal_encoder_tp_data(M3ForConditionalGeneration)


def test_ranks_share_only_where_they_are_asked_to(
    second_of_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vision_ranks(config("weights")) is None
    ranks = vision_ranks(config("data"))
    assert ranks is not None
    assert (ranks.rank, ranks.size) == (1, 2)
    gathered: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(
        media,
        "tensor_model_parallel_all_gather",
        lambda features, dim: gathered.append((features.shape, dim)),
    )
    ranks.gather(torch.zeros(3, 8))
    assert gathered == [((3, 8), 0)]
    monkeypatch.setattr(media, "get_tensor_model_parallel_world_size", lambda: 1)
    assert vision_ranks(config("data")) is None


def test_embeddings_are_made_by_all_ranks() -> None:
    model: Any = object.__new__(M3ForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.vision_tower = tower()
    grids = torch.tensor([[1, 4, 6], [8, 4, 4]])
    given = pixels(grids.tolist())
    calls: list[int] = []

    def gather(features: Tensor) -> Tensor:
        calls.append(len(features))
        return features

    with torch.no_grad():
        alone = model.embed_multimodal(pixel_values=given, image_grid_thw=grids)
        model.vision_ranks = VisionRanks(rank=0, size=1, gather=gather)
        shared = model.embed_multimodal(pixel_values=given, image_grid_thw=grids)
    assert calls == [6 + 32]
    assert [len(features) for features in shared] == [6, 32]
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
