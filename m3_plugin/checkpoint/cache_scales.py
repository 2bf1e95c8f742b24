"""Scales of an fp8 K and V cache: what exporters call them, and what an attention layer gets.

A stored key is the key divided by its layer's scale. Calibration finds one scale per layer or one
per KV head; without calibration a checkpoint has none, and the cache has unit scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from m3_plugin.model.config import local_heads
from m3_plugin.quantization.formats import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from m3_plugin.checkpoint.headers import TensorHeader

# ModelOpt puts a scale beside the projection, compressed-tensors beside all projections of a layer,
# Quark calls it the projection's output; hosts save it below their own attention layer.
_NAMES = re.compile(
    r"(?P<attention>.+\.self_attn)\.(?:"
    r"(?P<projection>[kv])_proj\.(?:(?P=projection)_scale|output_scale)"
    r"|(?:attn\.)?(?P<tensor>k|v|kv)_scale"
    # of queries and probabilities, which no cache holds; symmetric scales have zero points of 0
    r"|q_proj\.(?:q_scale|output_scale)|(?:attn\.)?q_scale|prob_output_scale"
    r"|(?:attn\.)?[qkv]_zero_point"
    r")$"
)


@dataclass(frozen=True)
class CacheScaleName:
    """A scale by its name in the checkpoint.

    Attributes
    ----------
    attention : module it belongs to, "model.layers.3.self_attn"
    what : "k", "v", "kv" for both, or "unused": exported beside them, no part of the cache
    """

    attention: str
    what: Literal["k", "v", "kv", "unused"]


def cache_scale_name(name: str) -> CacheScaleName | None:
    """What a tensor of the checkpoint scales; None if it is no cache scale."""
    match = _NAMES.match(name)
    if match is None:
        return None
    what = match["projection"] or match["tensor"] or "unused"
    return CacheScaleName(match["attention"], what)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CacheScales:
    """What one attention layer's stored keys and values are multiplied with.

    Attributes
    ----------
    k, v : fp32 [1] or [num_kv_heads]; None is unit scale
    """

    k: Tensor | None = None
    v: Tensor | None = None

    def with_scale(self, name: CacheScaleName, values: Tensor, *, tensor: str) -> CacheScales:
        """The same scales and one more.

        Parameters
        ----------
        name : of a scale that is used
        values : one number, or one per KV head, of any shape
        tensor : the checkpoint's name of it, for errors

        Raises
        ------
        ValueError : not positive and finite.
        """
        scale = values.detach().float().reshape(-1)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(
                f"tensor {tensor} scales an fp8 cache and must be positive and finite; "
                f"got {scale.tolist()}"
            )
        if name.what == "kv":
            return CacheScales(scale, scale)
        return replace(self, **{name.what: scale})

    def for_pages(self, dtype: torch.dtype) -> CacheScales:
        """The scales of pages of that dtype: none for 16 bits and more, which need no room."""
        return self if dtype.itemsize == 1 else CacheScales()

    def of_rank(
        self, *, num_kv_heads: int, rank: int, size: int, device: torch.device
    ) -> CacheScales:
        """The scales of a tensor parallel rank's own KV heads, where its kernels read them.

        Parameters
        ----------
        num_kv_heads : of the whole layer
        rank, size : of the tensor parallel group; ranks beyond the heads share a head
        device : of the rank
        """
        heads = local_heads(num_kv_heads, size)
        first = rank * num_kv_heads // size

        def own(scale: Tensor | None) -> Tensor | None:
            if scale is None:
                return None
            part = scale if scale.numel() == 1 else scale[first : first + heads]
            return part.to(device, copy=True)

        return CacheScales(own(self.k), own(self.v))

    def in_place_of(self, old: CacheScales, *, layer: str) -> CacheScales:
        """These values in the memory of a serving layer's scales, which kernels go on reading.

        A half that did not come stays as it is.

        Parameters
        ----------
        old : what the layer serves with, of the same rank
        layer : its name, for errors

        Raises
        ------
        ValueError : the layer has unit scale, or one scale for all heads, since the server began.
        """

        def kept(was: Tensor | None, new: Tensor | None) -> Tensor | None:
            if new is None:
                return was
            if was is None or new.numel() not in (1, was.numel()):
                served = "unit scale" if was is None else "one scale for all heads"
                raise ValueError(
                    f"{layer} keeps its fp8 cache with {served} since the server began, and "
                    f"cannot take {new.numel()} while it serves; start the server with them"
                )
            return was.copy_(new)

        return CacheScales(kept(old.k, self.k), kept(old.v, self.v))


def require_cache_scales(headers: Iterable[TensorHeader], *, num_kv_heads: int) -> None:
    """Refuse stored scales of a wrong shape or dtype, and half a pair.

    Parameters
    ----------
    headers : of any tensors; others than cache scales are passed over
    num_kv_heads : of the model

    Raises
    ------
    ValueError : names tensor and file.
    """
    stored: dict[str, dict[str, TensorHeader]] = {}
    for header in headers:
        name = cache_scale_name(header.name)
        if name is None or name.what == "unused":
            continue
        where = f"tensor {header.name} in {header.file}"
        if header.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{where} must be {' or '.join(FLOAT_DTYPES)}; got {header.dtype}")
        if math.prod(header.shape) not in (1, num_kv_heads):
            raise ValueError(
                f"{where} must hold one scale or one for each of the {num_kv_heads} KV heads; "
                f"got shape {list(header.shape)}"
            )
        stored.setdefault(name.attention, {}).update(dict.fromkeys(name.what, header))
    for attention, pair in stored.items():
        if len(pair) == 1:
            ((half, header),) = pair.items()
            raise ValueError(
                f"{attention} has an fp8 cache's {half} scale (tensor {header.name} in "
                f"{header.file}) without its {'v' if half == 'k' else 'k'} scale; "
                "are all shards there?"
            )
