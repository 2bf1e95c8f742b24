"""Checkpoints shared by the engine tests of all hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from m3_plugin.host.torchvision_ops import declare_missing_ops
from tests.integrations import starts
from tests.integrations.quantised import QuantisedCheckpoints

declare_missing_ops()
starts.count_processes()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the run started, beside pytest's own list of the longest tests."""
    if starts.started:
        terminalreporter.section("host starts")
        for line in starts.report():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a random checkpoint of a preset once; fp32."""
    from m3_plugin.testing.random_checkpoint import write_random_checkpoint

    written: dict[str, Path] = {}

    def write(preset: str) -> Path:
        if preset not in written:
            path = tmp_path_factory.mktemp("random") / preset
            written[preset] = write_random_checkpoint(path, preset=preset)  # type: ignore[arg-type]
        return written[preset]

    return write


@pytest.fixture(scope="session")
def constructed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint whose answers are known; fp32."""
    import torch

    from m3_plugin.testing.constructed import ConstructedCheckpoint

    path = tmp_path_factory.mktemp("constructed") / "checkpoint"
    return ConstructedCheckpoint().write(path, dtype=torch.float32)


@pytest.fixture(scope="session")
def random_quantised(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> QuantisedCheckpoints:
    """From the random checkpoint of preset `engine`."""
    return QuantisedCheckpoints(random_checkpoint("engine"), tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="session")
def constructed_quantised(
    constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> QuantisedCheckpoints:
    """From the checkpoint whose answers are known."""
    folder = tmp_path_factory.mktemp("constructed-quantised")
    return QuantisedCheckpoints(constructed_checkpoint, folder)


@pytest.fixture(scope="session")
def drafting_quantised(tmp_path_factory: pytest.TempPathFactory) -> QuantisedCheckpoints:
    """From the checkpoint whose answers are known, with an MTP module that drafts them."""
    import torch

    from m3_plugin.testing.constructed import ConstructedCheckpoint

    folder = tmp_path_factory.mktemp("drafting-quantised")
    source = ConstructedCheckpoint(mtp=True).write(folder / "plain", dtype=torch.float32)
    return QuantisedCheckpoints(source, folder)


@pytest.fixture(scope="session")
def m31_random(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes a random M3.1 with so many forced first blocks once (`m31.write_random`)."""
    from tests.integrations.m31 import write_random

    written: dict[int, Path] = {}

    def write(init: int) -> Path:
        if init not in written:
            written[init] = write_random(tmp_path_factory.mktemp("m31"), init=init)
        return written[init]

    return write


@pytest.fixture(scope="session")
def m31_constructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The M3.1 whose answers are known (`m31.write_constructed`)."""
    from tests.integrations.m31 import write_constructed

    return write_constructed(tmp_path_factory.mktemp("m31-constructed"))
