"""Cache bytes of MiniMax-M3 per token and rank, for any tensor parallel size and cache dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from m3_plugin.model.config import M3Config, local_heads

CacheDType = Literal["fp32", "bf16", "fp16", "fp8", "int8", "planes", "nvfp4"]

_BYTES_PER_VALUE = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "planes": 2.0,
    "nvfp4": 0.5,
}
# One e4m3 scale per 16 values for nvfp4; one scale per token for index keys in int8 or two planes.
_NVFP4_GROUP = 16
_SCALE_BYTES = {"int8": 2, "planes": 2}


@dataclass(frozen=True)
class CacheBytes:
    """Bytes one token occupies on one tensor parallel rank, summed over layers.

    Attributes
    ----------
    kv : K and V of all layers; KV heads are split over ranks, replicated once ranks exceed heads
    index : index keys of the sparse layers; one shared head, so every rank holds all of them
    """

    kv: int
    index: int

    @property
    def total(self) -> int:
        """Bytes per token and rank."""
        return self.kv + self.index

    def context(self, num_tokens: int) -> int:
        """Bytes per rank for one sequence of `num_tokens`."""
        return self.total * num_tokens


def vector_bytes(width: int, dtype: CacheDType) -> int:
    """Bytes of one cached vector of `width` channels, its scales included."""
    values = int(width * _BYTES_PER_VALUE[dtype])
    if dtype == "nvfp4":
        return values + width // _NVFP4_GROUP
    return values + _SCALE_BYTES.get(dtype, 0)


def cache_bytes_per_token(
    config: M3Config,
    *,
    tp_size: int = 1,
    kv_dtype: CacheDType = "bf16",
    index_dtype: CacheDType = "bf16",
) -> CacheBytes:
    """Cache bytes per token and rank.

    Parameters
    ----------
    config : the model
    tp_size : tensor parallel ranks
    kv_dtype, index_dtype : storage of the main K/V and of the index keys

    Raises
    ------
    ValueError : `tp_size` and the KV heads do not divide each other.
    """
    heads = local_heads(config.num_key_value_heads, tp_size)
    kv = 2 * heads * vector_bytes(config.head_dim, kv_dtype) * config.num_hidden_layers
    index = 0
    if config.msa is not None:
        index = vector_bytes(config.msa.index_dim, index_dtype) * config.num_sparse_layers
    return CacheBytes(kv=kv, index=index)
