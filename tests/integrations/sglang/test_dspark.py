"""M3.1's draft is refused in one sentence, however it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.model.taking import draft_refusal, is_dspark
from m3_plugin.testing.dspark import add_dspark
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from m3_sglang.compat import speculation_is_tested

BY_PATH = "is not served with MiniMax-M3: DSpark and DFlash drafts, M3.1's in dspark/ among them"
BY_NAME = "--speculative-algorithm must be None or NEXTN or EAGLE or EAGLE3 for MiniMax-M3; got"


@pytest.mark.skipif(not speculation_is_tested(), reason="no speculation on this SGLang")
def test_every_way_of_asking(tmp_path: Path) -> None:
    checkpoint, report = tmp_path / "m31", tmp_path / "report.json"
    add_dspark(write_random_checkpoint(checkpoint, preset=M31_PRESETS["engine"]))
    command = [sys.executable, "-m", "tests.integrations.sglang.dspark_asked"]
    done = subprocess.run(
        [*command, str(checkpoint), str(report)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, str] = json.loads(report.read_text())
    for name, sentence in said.items():
        by_path = name.startswith(("EAGLE3", "NEXTN"))
        assert (BY_PATH if by_path else BY_NAME) in sentence, (name, sentence)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["DSparkMiniMaxDraftModel"]}, True),
        ({"text_config": {"dspark_block_size": 7}}, True),
        ({"dspark_markov_rank": 256}, True),
        (
            {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "text_config": None},
            False,
        ),
        ({}, False),
    ],
)
def test_a_draft_is_known_by_its_config(config: dict[str, Any], found: bool) -> None:
    """Hosts rename its architecture, so that its keys count as well."""
    assert is_dspark(config) is found
    assert "left unread; do so" in str(draft_refusal("x", instead="do so"))
