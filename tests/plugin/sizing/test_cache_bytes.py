"""Cache bytes against the published arithmetic (bytes per token, GB at 1,048,576 tokens)."""

from __future__ import annotations

import pytest

from m3_kernels.index_pages import PLANES_DTYPE, bytes_per_token, channels
from m3_plugin.model.config import M3Config, local_heads
from m3_plugin.sizing.cache_bytes import (
    CacheDType,
    cache_bytes_per_token,
    vector_bytes,
)
from tests.plugin.model.test_config import HUB

TABLE: list[tuple[CacheDType, CacheDType, int, int, float]] = [
    ("bf16", "bf16", 1, 137_472, 144.15),
    ("bf16", "bf16", 2, 76_032, 79.73),
    ("bf16", "bf16", 4, 45_312, 47.51),
    ("bf16", "bf16", 8, 45_312, 47.51),
    ("fp8", "bf16", 1, 76_032, 79.73),
    ("fp8", "bf16", 2, 45_312, 47.51),
    ("fp8", "bf16", 4, 29_952, 31.41),
    ("fp8", "fp8", 1, 68_736, 72.07),
    ("fp8", "fp8", 2, 38_016, 39.86),
    ("fp8", "fp8", 8, 22_656, 23.76),
    ("nvfp4", "fp8", 1, 41_856, 43.89),
    ("nvfp4", "fp8", 2, 24_576, 25.77),
    ("nvfp4", "fp8", 4, 15_936, 16.71),
]


@pytest.mark.parametrize(("kv", "index", "tp_size", "per_token", "gigabytes"), TABLE)
def test_published_table(
    kv: CacheDType, index: CacheDType, tp_size: int, per_token: int, gigabytes: float
) -> None:
    config = M3Config.from_hf(HUB)
    cache = cache_bytes_per_token(config, tp_size=tp_size, kv_dtype=kv, index_dtype=index)
    assert cache.total == per_token
    assert round(cache.context(1_048_576) / 1e9, 2) == gigabytes


def test_int8_index_keys_take_what_their_pages_hold() -> None:
    assert vector_bytes(128, "int8") == bytes_per_token(128)
    assert vector_bytes(128, "planes") == channels(128, PLANES_DTYPE) * PLANES_DTYPE.itemsize


def test_index_keys_are_replicated_on_every_rank() -> None:
    config = M3Config.from_hf(HUB)
    shares = {cache_bytes_per_token(config, tp_size=tp).index for tp in (1, 2, 4, 8, 16)}
    assert shares == {14_592}


@pytest.mark.parametrize(("heads", "tp_size"), [(4, 3), (64, 6), (4, 6), (4, 0)])
def test_uneven_head_shares_are_refused(heads: int, tp_size: int) -> None:
    with pytest.raises(ValueError, match=str(tp_size)):
        local_heads(heads, tp_size)
