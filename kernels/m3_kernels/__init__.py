"""Block-sparse attention primitives for MiniMax-M3: one folder per op, torch only at import."""

from m3_kernels.capability import Backend, KernelFamily, kernel_families

__all__ = ["Backend", "KernelFamily", "kernel_families"]
