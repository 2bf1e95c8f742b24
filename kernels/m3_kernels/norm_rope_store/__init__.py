"""The op `norm_rope_store`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.norm_rope_store.interface import norm_rope_store

__all__ = ["norm_rope_store"]
