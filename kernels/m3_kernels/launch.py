"""One launch of a Triton kernel as a value: serving makes it, the compile gate reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel and all that it is launched with.

    An op's `launches` yields them in their order. It looks at shapes, strides and dtypes alone, so
    that for a call of meta tensors it says what would be launched on a GPU.

    Attributes
    ----------
    kernel : the function decorated with triton.jit
    grid : programs, one to three numbers
    arguments : every parameter of the kernel by name, and Triton's own: num_warps, num_stages,
        launch_pdl
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def __call__(self) -> None:
        """Put it into the stream."""
        self.kernel[self.grid](**self.arguments)
