"""The op `norm_rope_store`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.norm_rope_store.call import NormRopeStore
from m3_kernels.norm_rope_store.interface import NORM_ROPE_STORE, norm_rope_store
from m3_kernels.norm_rope_store.parts import HeadNorms

__all__ = ["NORM_ROPE_STORE", "HeadNorms", "NormRopeStore", "norm_rope_store"]
