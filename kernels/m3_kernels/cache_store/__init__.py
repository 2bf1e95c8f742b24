"""The op `cache_store`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.cache_store.call import CacheStore
from m3_kernels.cache_store.interface import CACHE_STORE, cache_store

__all__ = ["CACHE_STORE", "CacheStore", "cache_store"]
