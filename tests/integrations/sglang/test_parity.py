"""Random checkpoints against transformers in fp32: the cases of all hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.parity import ParityCases
from tests.integrations.sglang.engine import EngineProcess


class TestParity(ParityCases):
    """The cases of all hosts."""

    @pytest.fixture(scope="class")
    def engine(self, random_engine: EngineProcess) -> EngineProcess:
        return random_engine

    def dense_rows(self, engine: EngineProcess) -> int:
        return int(engine.metric("m3_plugin:dense_rows_total"))

    def start(self, checkpoint: Path, folder: Path, **options: Any) -> EngineProcess:
        return EngineProcess(checkpoint, log=folder / "engine.log", **options)
