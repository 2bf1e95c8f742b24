"""docs/support.md: every cell is an answer, and what it quotes is really said."""

from __future__ import annotations

import re
from pathlib import Path

from tests.deployment import support_rows

ROOT = Path(__file__).parents[2]
ANSWERS = ("served", "refused", "unknown", "host")


def test_every_cell_is_an_answer() -> None:
    rows = support_rows()
    assert len(rows) > 60
    for feature, *cells in rows:
        for cell in cells:
            assert cell == "-" or cell.startswith(ANSWERS), f"{feature}: {cell}"
            assert not cell.endswith("."), f"{feature}: {cell}"
    assert len({feature for feature, *_ in rows}) == len(rows)


def test_quoted_refusals_are_ours() -> None:
    """Those of a host are marked as its own ("vLLM says") and looked up where it is installed."""
    sources = [*ROOT.glob("m3_plugin/**/*.py"), *ROOT.glob("integrations/**/*.py")]
    text = " ".join(re.sub(r'"\s*f?"', "", path.read_text().replace("\n", " ")) for path in sources)
    text = " ".join(text.split())
    quoted = [
        said
        for _, *cells in support_rows()
        for cell in cells
        if cell.startswith("refused") and "vLLM says" not in cell
        for said in re.findall(r'"([^"]+)"', cell)
    ]
    assert len(quoted) > 10
    assert [said for said in quoted if said not in text] == []


def test_names_that_users_look_for_are_there() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    for name in (
        *("Inferact/MiniMax-M3-EAGLE3", "--language-model-only", "LMCache", "expert parallel"),
        *("multi-node", "ROCm", "CUDA version", "--enable-lora", "NIXL", "async scheduling"),
        *("data parallel attention", "structured output", "--skip-mm-profiling"),
    ):
        assert name in page, name
