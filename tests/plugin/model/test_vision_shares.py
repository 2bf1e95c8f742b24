"""Pictures shared out among ranks: equal features, and each rank encodes its part only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from m3_plugin.model.vision import M3Vision, VisionConfig
from m3_plugin.model.vision_shares import VisionRanks, deal_segments, shared_features

CONFIG = VisionConfig(
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    text_hidden_size=32,
    projector_hidden_size=32,
)
# images of one size, a video of three segments, and pictures that no rank can halve
STEPS = {
    "two images": [[1, 4, 6], [1, 4, 6]],
    "a video": [[8, 4, 4]],
    "mixed": [[1, 8, 8], [1, 2, 2], [10, 4, 4], [1, 4, 6]],
    "one image": [[1, 4, 6]],
    "nothing": [],
}


def tower() -> M3Vision:
    torch.manual_seed(0)
    return M3Vision(CONFIG)


def pixels(grids: list[list[int]]) -> Tensor:
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, CONFIG.patch_dim, generator=torch.Generator().manual_seed(1))


def encode_as(rank: int, size: int, folder: str) -> None:
    """What a rank of a host does: its features and the rows its tower saw, to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size)

    def gather(features: Tensor) -> Tensor:
        found = [torch.empty_like(features) for _ in range(size)]
        dist.all_gather(found, features)
        return torch.cat(found)

    seen: list[int] = []
    model = tower()
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    ranks = VisionRanks(rank=rank, size=size, gather=gather)
    with torch.no_grad():
        features = {
            name: shared_features(model, pixels(grids), grids, ranks=ranks)
            for name, grids in STEPS.items()
        }
    torch.save((features, dict(zip(STEPS, seen, strict=True))), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_see_half_the_patches_and_return_equal_features(tmp_path: Path) -> None:
    spawn(encode_as, (2, str(tmp_path)), nprocs=2)
    (first, rows), (second, others) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    model = tower()
    for name, grids in STEPS.items():
        given = pixels(grids)
        with torch.no_grad():
            alone = model(given, grids)
        torch.testing.assert_close(first[name], alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])
        assert rows[name] + others[name] == len(given)
    for name in ("two images", "a video"):
        assert rows[name] == others[name]
    assert (rows["one image"], others["one image"]) == (24, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_segment_goes_to_one_rank_and_none_has_more_than_it_must(size: int) -> None:
    segments = [(1, 8, 8), (4, 4, 4), (2, 2, 2), (1, 2, 4), (4, 4, 4), (3, 6, 6)]
    dealt = deal_segments(segments, size=size)
    assert sorted(i for indices in dealt for i in indices) == list(range(len(segments)))
    sizes = [t * h * w for t, h, w in segments]
    loads = [sum(sizes[i] for i in indices) for indices in dealt]
    assert max(loads) - min(loads) <= max(sizes)


def test_wrong_pictures_are_refused_before_any_rank_waits_for_another() -> None:
    def gather(features: Tensor) -> Tensor:
        raise AssertionError("a rank that refuses must not leave others waiting")

    ranks = VisionRanks(rank=0, size=2, gather=gather)
    with pytest.raises(ValueError, match="grid_thw counts 24 patches; pixel_values has 23 rows"):
        shared_features(tower(), pixels([[1, 4, 6]])[1:], [[1, 4, 6]], ranks=ranks)
