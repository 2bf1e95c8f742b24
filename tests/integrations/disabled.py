"""With M3_PLUGIN_DISABLE=1 a host gets M3.1's folder as if the plugin were not there.

A host's `test_disabled.py` derives `DisabledCases` with a script that asks the host's own functions
which class and which method it has for each folder it is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from m3_plugin.model.released import published_config
from tests.integrations.foreign import write
from tests.integrations.m31 import PUBLISHED


class DisabledCases:
    """As far as a CPU goes: the class, the method, and nothing of ours.

    Attributes
    ----------
    ask : script that prints "ANSWER " and, as JSON, for each folder of its arguments a mapping with
        "model" (a module), "quantization" and "ours" (methods of ours that are registered)
    environment : of the host's processes
    model : how the module of the host's own class begins
    quantization : the host's own method for M3.1; None where it has none of its own
    """

    ask: ClassVar[str]
    environment: ClassVar[Mapping[str, str]]
    model: ClassVar[str]
    quantization: ClassVar[str | None]

    @pytest.mark.extended
    def test_m3_1_is_the_host_s_own(
        self, m31_random: Callable[[int], Path], tmp_path: Path
    ) -> None:
        """The published config, and the folder that the other tests serve with the plugin."""
        published = write(tmp_path / "published", published_config(PUBLISHED))
        for answer in self.answers(published, m31_random(2) / "stored"):
            assert answer["model"].startswith(self.model), answer
            assert answer["ours"] == []
            if self.quantization is not None:
                assert answer["quantization"] == self.quantization

    def answers(self, *folders: Path) -> list[dict[str, Any]]:
        environment = {**os.environ, **self.environment, "M3_PLUGIN_DISABLE": "1"}
        environment.pop("M3_PLUGIN_REQUIRED", None)
        done = subprocess.run(
            [sys.executable, "-c", self.ask, *map(str, folders)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
        answers: list[dict[str, Any]] = json.loads(line.removeprefix("ANSWER "))
        assert len(answers) == len(folders)
        return answers
