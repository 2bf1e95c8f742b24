"""Further plugins of SGLang for tests, beside ours: hooks in the processes of an engine.

`install` writes the metadata of a distribution, by which SGLang's own loader finds the module's
`register` in every process. The processes share nothing else with the test, so that both sides
speak through files in the plugin's folder.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "M3_TEST_PLUGIN"


def install(folder: Path, *, module: str) -> dict[str, str]:
    """Make `module` a plugin; returns the variables of engines that are to load it."""
    info = folder / "m3_test_plugin-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: m3-test-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\nm3_test_plugin = {module}:register\n"
    )
    return {"PYTHONPATH": str(folder), VARIABLE: str(folder)}


def folder() -> Path:
    """The plugin's folder, in a process of the engine."""
    return Path(os.environ[VARIABLE])
