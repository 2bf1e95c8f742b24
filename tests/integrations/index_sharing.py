"""What both hosts are asked when ranks share out the scan of index keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.speculation import ids

# Every step of decoding is shared; a bound between those of the batch's first and last steps.
ALWAYS = {
    "M3_PLUGIN_INDEX_SHARING": "scan",
    "M3_PLUGIN_INDEX_SHARING_FROM": "1",
    # each layer of each step is compared with a scan of all blocks
    "M3_PLUGIN_CHECK": "1",
}
SOMETIMES = ALWAYS | {"M3_PLUGIN_INDEX_SHARING_FROM": "6000"}
SAID = "scans of index keys are shared by {} ranks"
# far beyond the budget, and one request of so few blocks that a rank owns none of them
LENGTHS = (1400, 2300, 4000, 5000, 150)

# (layer, position) -> the blocks each group of heads chose
Selections = dict[tuple[int, int], list[list[int]]]


class Engine(Protocol):
    """An engine of either host on the constructed checkpoint."""

    def generate(self, prompts: Sequence[Any], *, max_tokens: int | Sequence[int]) -> list[Any]: ...


def require_right_answers(engine: Engine) -> None:
    """Several requests at once, decoys among their words; then a long one alone, from the cache."""
    prompts = [
        needle_prompt(seed, num_tokens=n, decoys=n > 1000, hops=4 if n > 1000 else 2)
        for seed, n in enumerate(LENGTHS)
    ]
    outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
    assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
    assert prompts[3].dense_answer not in (None, outputs[3].text)
    (again,) = engine.generate(ids(prompts[3:4]), max_tokens=prompts[3].max_tokens)
    assert tuple(again.token_ids) == prompts[3].expected_ids
    assert again.num_cached_tokens >= 4992


def recorded(folder: Path) -> dict[str, str]:
    """Variables with which every rank writes down what it chooses."""
    return {"M3_PLUGIN_RECORD_BLOCKS": str(folder)}


def decoded(file: Path) -> Selections:
    """What a rank chose while a single request was decoded."""
    found: Selections = {}
    rows: list[list[int]] = []
    for line in file.read_text().splitlines()[1:]:
        step = json.loads(line)
        rows = step.get("rows", rows)
        for row, (position, _, count) in enumerate(rows):
            if count <= 8:
                found[step["layer"], position] = [group[row] for group in step["ids"]]
    return found


def require_equal_selections(alone: Path, together: Path, *, ranks: int) -> None:
    """Those of one rank, whose groups the others have between them, in the order of ranks.

    Files do not say whose they are, so that some order must give all groups of one rank.
    """
    (file,) = alone.glob("*.jsonl")
    one = decoded(file)
    parts = [decoded(file) for file in together.glob("*.jsonl")]
    assert len(parts) == ranks
    assert all(part.keys() == one.keys() for part in parts)
    assert max(len(set(groups[0])) for groups in one.values()) == 4
    joined = (
        {key: [group for part in order for group in part[key]] for key in one}
        for order in permutations(parts)
    )
    assert one in list(joined)
