"""The op `quantised_experts`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.quantised_experts.interface import quantised_experts

__all__ = ["quantised_experts"]
