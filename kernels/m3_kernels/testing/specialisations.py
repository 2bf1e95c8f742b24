"""Which machine code launches ask Triton for, without a GPU: launches are written down, not made.

Triton compiles a kernel once for each combination of constants, dtypes, and classes of its other
arguments: an integer is 1, a multiple of 16 or neither, a pointer is a multiple of 16 or not. One
that comes up for the first time while a server answers makes a user wait for a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from m3_kernels import capability, tuning


@contextmanager
def recorded(arch: int) -> Iterator[list[tuple[str, str]]]:
    """Within: (kernel, what of it is compiled) of each launch on CPU tensors, in order.

    Kernels run nowhere, so results are whatever memory holds.

    Parameters
    ----------
    arch : the chip whose configurations are chosen, major * 10 + minor

    Raises
    ------
    RuntimeError : kernels of this process are interpreted ones
    """
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    if not isinstance(tl.sort, jit.JITFunction):
        raise RuntimeError("nothing is compiled with TRITON_INTERPRET=1; use a process without it")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    binders: dict[int, Any] = {}
    launches: list[tuple[str, str]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if id(kernel) not in binders:
            binders[id(kernel)] = jit.create_function_from_signature(
                kernel.signature, kernel.params, backend
            )
        _, specialisation, options = binders[id(kernel)](*args, **kwargs)
        launches.append((kernel.fn.__name__, f"{specialisation} {options}"))

    with (
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(tuning, "INTERPRETER_ARCH", arch),
        mock.patch.object(capability, "_interpreter_refusal", return_value=None),
    ):
        yield launches
