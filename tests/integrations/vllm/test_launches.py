"""The table of launches in docs/gpu-audit.md is what the command counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "gpu-audit.md"


def test_the_table_is_what_the_command_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.integrations.vllm.launches"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = done.stdout.strip()[done.stdout.index("| step ") :]
    assert rows in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n{rows}"
    # what users wait for most: one token after another
    decode = next(line for line in rows.splitlines() if line.startswith("| decode "))
    ours, own = (int(cell) for cell in decode.split("|")[2:4])
    assert ours < own
