"""Scans of index keys shared out over SGLang's ranks of attention, on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import needle_prompt
from m3_sglang.compat import speculation_is_tested
from tests.integrations.index_keys import INT8, PLANES
from tests.integrations.index_sharing import (
    ALWAYS,
    SAID,
    SOMETIMES,
    recorded,
    require_equal_selections,
    require_right_answers,
)
from tests.integrations.sglang.engine import EngineProcess, speculation
from tests.integrations.speculation import drafting_checkpoint, ids

CORES = {2: "0|1", 4: "0|1|0|1"}


def start(
    checkpoint: Path, folder: Path, variables: dict[str, str], *, ranks: int = 2, **options: Any
) -> EngineProcess:
    return EngineProcess(
        checkpoint,
        log=folder / "engine.log",
        tp_size=ranks,
        environment={"SGLANG_CPU_OMP_THREADS_BIND": CORES[ranks], **variables},
        **options,
    )


def test_two_ranks_answer(constructed_checkpoint: Path, tmp_path: Path) -> None:
    with start(constructed_checkpoint, tmp_path, SOMETIMES, chunked_prefill_size=1024) as engine:
        require_right_answers(engine)
        assert engine.log_text().count(SAID.format(2)) == 2


@pytest.mark.extended
@pytest.mark.parametrize("variables", [{}, INT8, PLANES], ids=["keys", "int8", "planes"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_choose_what_one_does(
    constructed_checkpoint: Path, tmp_path: Path, variables: dict[str, str], ranks: int
) -> None:
    """In chunks; then, step by step of decoding, the same blocks."""
    prompt = needle_prompt(4096, num_tokens=4096)
    folders = {1: tmp_path / "one", ranks: tmp_path / "more"}
    for count, folder in folders.items():
        cores = {"SGLANG_CPU_OMP_THREADS_BIND": CORES[ranks]}
        with EngineProcess(
            constructed_checkpoint,
            log=tmp_path / f"{count}.log",
            tp_size=count,
            chunked_prefill_size=1024,
            environment={
                **variables,
                **recorded(folder),
                **(ALWAYS | cores if count > 1 else {}),
            },
        ) as engine:
            (output,) = engine.generate(ids([prompt]), max_tokens=prompt.max_tokens)
            assert tuple(output.token_ids) == prompt.expected_ids
            if count > 1:
                require_right_answers(engine)
    require_equal_selections(folders[1], folders[ranks], ranks=ranks)


@pytest.mark.extended
@pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")
def test_drafts_are_verified(tmp_path: Path) -> None:
    """The module's own layer shares its scans too, in all steps of a draft."""
    checkpoint = drafting_checkpoint(tmp_path / "checkpoint", wrong_every=2)
    with start(checkpoint, tmp_path, ALWAYS, **speculation(checkpoint, steps=3)) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        accepted = sum(output.num_accepted for output in outputs)
        assert 0 < accepted < 3 * sum(output.num_verify_steps for output in outputs)
