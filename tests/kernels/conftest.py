"""What all tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The references make millions of tiny operations, which threads only slow down.

    That the C++ kernels give the same bits with more threads is tested in test_invariance.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
