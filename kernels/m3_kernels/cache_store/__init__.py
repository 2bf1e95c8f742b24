"""The op `cache_store`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.cache_store.interface import cache_store

__all__ = ["cache_store"]
