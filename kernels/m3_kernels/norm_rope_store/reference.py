"""The oracle of norm and RoPE: one token, one head and one pair of channels at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from m3_kernels.cache_store.reference import cache_store_reference
from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.norm_rope_store.parts import Part


def norm_and_rope_reference(parts: Sequence[Part], *, cos_sin: Tensor, eps: float) -> None:
    """Fill every part's `out` with its heads normalised and rotated."""
    half = cos_sin.shape[1] // 2
    for part in parts:
        for token, angles in enumerate(cos_sin.float()):
            for head in range(part.heads.shape[1]):
                values = part.heads[token, head].float()
                size = (values.square().mean() + eps).sqrt()
                values = values / size * (1 + part.weight.float())
                rotated = values.clone()
                for c in range(half):
                    cos, sin = angles[c], angles[half + c]
                    rotated[c] = values[c] * cos - values[half + c] * sin
                    rotated[half + c] = values[half + c] * cos + values[c] * sin
                part.out[token, head] = rotated


def norm_rope_store_reference(call: NormRopeStore) -> None:
    """Fill the queries, and store what became of keys and index keys."""
    stored = call.stored
    keys, index_keys = call.rotated()
    norm_and_rope_reference(call.parts(keys, index_keys), cos_sin=call.cos_sin, eps=call.norms.eps)
    cache_store_reference(replace(stored, k=keys, index_k=index_keys))
