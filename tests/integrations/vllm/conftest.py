"""Tests through vLLM; every one is marked `vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interpreters import Forking, forking


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def gpus() -> Iterator[Forking]:
    """Processes in which vLLM believes in GPUs; a model is built in each on the meta device."""
    with forking("tests.integrations.vllm.gpu_process") as process:
        yield process


@pytest.fixture(scope="session", autouse=True)
def _no_leftover_processes() -> Iterator[None]:
    """Nothing a test started may outlive the session."""
    yield
    import multiprocessing

    assert not [child.name for child in multiprocessing.active_children()]
