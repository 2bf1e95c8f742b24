"""M3.1's draft is refused in one sentence, however it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3_plugin.testing.dspark import add_dspark
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint

pytestmark = pytest.mark.vllm

OURS = "is not served with MiniMax-M3: DSpark and DFlash drafts, M3.1's in dspark/ among them"


def test_every_way_of_asking(tmp_path: Path) -> None:
    """Where vLLM refuses before it looks at a model, its own words stand."""
    checkpoint, report = tmp_path / "m31", tmp_path / "report.json"
    add_dspark(write_random_checkpoint(checkpoint, preset=M31_PRESETS["engine"]))
    command = [sys.executable, "-m", "tests.integrations.vllm.dspark_asked"]
    done = subprocess.run(
        [*command, str(checkpoint), str(report)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, str] = json.loads(report.read_text())
    for name in (
        "the folder",
        "the folder as dspark",
        "the folder as dflash",
        "the folder as eagle3",
        "the target as dflash",
    ):
        assert OURS in said[name], (name, said[name])
        assert "leave --speculative-config out" in said[name]
    # by methods alone: a worker on a GPU asks `require_speculation`
    assert "does not support: dspark" in said["dspark"] or OURS in said["dspark"]
    assert "Input should be" in said["DSPARK"]
    assert "without speculative model" in said["dflash"]
