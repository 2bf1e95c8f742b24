"""What tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from m3_kernels import native_build


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work is cut differently with more than one thread, so have two, however small the step.

    Which thread meets which is chance.
    """
    monkeypatch.setattr(native_build, "WORK_PER_THREAD", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
