"""What both hosts are asked when they keep index keys in int8 or in two planes of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pytest

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.speculation import PAGE, ids

INT8 = {"M3_PLUGIN_INDEX_KEYS": "int8"}
PLANES = {"M3_PLUGIN_INDEX_KEYS": "planes"}
# Hosts treat both alike, as vectors of another dtype and width: one of them is enough every day.
STORED = (
    pytest.param(INT8, marks=pytest.mark.extended, id="int8"),
    pytest.param(PLANES, id="planes"),
)


class Engine(Protocol):
    """An engine of either host on the constructed checkpoint."""

    def generate(self, prompts: Sequence[Any], *, max_tokens: int | Sequence[int]) -> list[Any]: ...


def require_right_answers_and_reused_pages(engine: Engine) -> None:
    """Far beyond the budget, in chunks, in company, and from the prefix cache."""
    chain = needle_prompt(4096, num_tokens=4096)
    company = [needle_prompt(seed, num_tokens=1400 + 333 * seed) for seed in range(1, 5)]
    prompts = [chain, *company]
    outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
    assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
    assert chain.dense_answer not in (None, outputs[0].text)
    (again,) = engine.generate(ids([chain]), max_tokens=chain.max_tokens)
    assert tuple(again.token_ids) == chain.expected_ids
    assert again.num_cached_tokens == (4096 - 1) // PAGE * PAGE
