"""Norm and RoPE through the C++ kernels, all parts of a layer in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from m3_kernels.native_build import array, call
from m3_kernels.norm_rope_store.parts import Part


def norm_and_rope_native(parts: Sequence[Part], *, cos_sin: Tensor, eps: float) -> None:
    """Fill every part's `out` with its heads normalised and turned; four parts, as a layer has."""
    described = [array(tensor) for part in parts for tensor in part]
    call("m3_norm_and_rope", *described, array(cos_sin), float(eps))
