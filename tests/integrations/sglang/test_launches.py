"""SGLang's table of launches in docs/gpu-audit.md is what the command counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpreters import interpret

PAGE = Path(__file__).parents[3] / "docs" / "gpu-audit.md"


@pytest.mark.extended
def test_the_table_is_what_the_command_prints() -> None:
    done = interpret("-W", "ignore", "-m", "tests.integrations.sglang.launches")
    rows = "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))
    assert rows in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n{rows}"
