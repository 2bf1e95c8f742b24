"""Every test of this folder runs the Triton kernels in Triton's interpreter, on the CPU.

Tests import the kernels' files within their functions, or through the ops with backend="triton".
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from m3_kernels.testing.interpreter import interpreted


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels imported or run by a test are interpreted ones."""
    with interpreted():
        yield
