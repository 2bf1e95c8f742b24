"""Tests through SGLang; every one is marked `sglang`, and none is collected without SGLang."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integrations.sglang.engine import EngineProcess


def _sglang_is_installed() -> bool:
    try:
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# The two hosts pin different releases of what they share, so an environment holds one of them.
collect_ignore_glob = [] if _sglang_is_installed() else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sglang: needs SGLang installed and runs a real engine or server"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def random_engine(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """An engine on the random checkpoint of preset `engine`, in fp32."""
    log = tmp_path_factory.mktemp("random-engine") / "engine.log"
    with EngineProcess(
        random_checkpoint("engine"),
        log=log,
        enable_metrics=True,
        environment={"M3_PLUGIN_STATISTICS": "1"},
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def constructed_engine(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """An engine on the constructed checkpoint with room for 32K tokens."""
    with EngineProcess(
        constructed_checkpoint,
        log=tmp_path_factory.mktemp("constructed-engine") / "engine.log",
        context_length=40960,
        max_total_tokens=49152,
        # SGLang's torch-native dense attention computes a whole square per chunk, so few of them
        chunked_prefill_size=8192,
    ) as engine:
        yield engine


@pytest.fixture(scope="session", autouse=True)
def _no_leftover_processes() -> Iterator[None]:
    """Nothing a test started may outlive the session."""
    yield
    import multiprocessing

    assert not [child.name for child in multiprocessing.active_children()]
