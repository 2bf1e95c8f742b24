"""Norm and RoPE through the C++ kernels, all parts of a layer in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from m3_kernels.cache_store.native import cache_store_native
from m3_kernels.native_build import array, call
from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.norm_rope_store.parts import Part


def norm_and_rope_native(parts: Sequence[Part], *, cos_sin: Tensor, eps: float) -> None:
    """Fill every part's `out` with its heads normalised and rotated; four parts, as a layer has."""
    described = [array(tensor) for part in parts for tensor in part]
    call("m3_norm_and_rope", *described, array(cos_sin), float(eps))


def norm_rope_store_native(call: NormRopeStore) -> None:
    """Fill the queries, and store what became of keys and index keys."""
    stored = call.stored
    keys, index_keys = call.rotated()
    norm_and_rope_native(call.parts(keys, index_keys), cos_sin=call.cos_sin, eps=call.norms.eps)
    cache_store_native(replace(stored, k=keys, index_k=index_keys))
