"""One vision tower on each rank, and the pictures of a step shared out among the ranks.

Attention never leaves a segment (`m3_plugin.model.vision`), so segments are dealt out, each whole:
one image cannot be divided, a video of more than `segment_patches` temporal patches can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_plugin.model.vision import Grid, M3Vision, split_segments


@dataclass(frozen=True, kw_only=True)
class VisionRanks:
    """The ranks that see the same pictures.

    Attributes
    ----------
    rank, size : of this process, and how many there are
    gather : [n, hidden] of each rank, the same n everywhere -> [size * n, hidden] in their order
    """

    rank: int
    size: int
    gather: Callable[[Tensor], Tensor]


def deal_segments(segments: Sequence[Grid], *, size: int) -> list[list[int]]:
    """Which segments each rank encodes, in order; the same list on every rank.

    Each, the largest first, goes to the rank that has the fewest patches so far.
    """
    dealt: list[list[int]] = [[] for _ in range(size)]
    patches = [0] * size
    for index in sorted(range(len(segments)), key=lambda i: -_patches(segments[i])):
        rank = patches.index(min(patches))
        dealt[rank].append(index)
        patches[rank] += _patches(segments[index])
    return [sorted(indices) for indices in dealt]


def shared_features(
    tower: M3Vision,
    pixel_values: Tensor,
    grid_thw: Tensor | Sequence[Sequence[int]],
    *,
    ranks: VisionRanks,
) -> Tensor:
    """What `tower(pixel_values, grid_thw)` returns, of which each rank encodes a part.

    To rounding: a product over other rows may sum in another order. Every rank must call it, with
    the same pictures.

    Parameters
    ----------
    pixel_values, grid_thw : as in `M3Vision.forward`, of all pictures
    """
    grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    tower.check_inputs(pixel_values, grids)
    segments = split_segments(grids, segment_patches=tower.config.segment_patches)
    dealt = deal_segments(segments, size=ranks.size)
    parts = pixel_values.split([_patches(segment) for segment in segments])
    mine = dealt[ranks.rank]
    own = pixel_values[:0] if not mine else torch.cat([parts[index] for index in mine])
    features = tower(own, [segments[index] for index in mine])

    lengths = [_patches(segment) // tower.config.merge_length for segment in segments]
    most = max(sum(lengths[index] for index in indices) for indices in dealt)
    padded = features.new_zeros(most, features.shape[1])
    padded[: len(features)] = features
    found: dict[int, Tensor] = {}
    for indices, of_rank in zip(dealt, ranks.gather(padded).split(max(most, 1)), strict=False):
        sizes = [lengths[index] for index in indices]
        found |= zip(indices, of_rank[: sum(sizes)].split(sizes), strict=True)
    return torch.cat([found[index] for index in range(len(segments))]) if found else features


def _patches(grid: Grid) -> int:
    t, h, w = grid
    return t * h * w
