"""Every test of this folder runs the Triton kernels in Triton's interpreter, on the CPU.

Tests import the kernels' files within their functions, or through the ops with backend="triton".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from m3_kernels.testing.interpreter import interpreted


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels imported or run by a test are interpreted ones."""
    with interpreted():
        yield


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products add up in the order of k, as tensor cores do, whatever the shape of the tile.

    The interpreter calls BLAS, whose order depends on the shape.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        total = acc.data.copy()
        for k in range(a.data.shape[1]):
            column = a.data[:, k, None].astype(total.dtype)
            total += column * b.data[None, k].astype(total.dtype)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
