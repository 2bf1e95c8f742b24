"""Scans of index keys shared out over vLLM's tensor-parallel ranks, on gloo or shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.index_keys import INT8, PLANES
from tests.integrations.index_sharing import (
    ALWAYS,
    SOMETIMES,
    recorded,
    require_equal_selections,
    require_right_answers,
)
from tests.integrations.speculation import drafting_checkpoint, ids
from tests.integrations.vllm.engine import EngineProcess

CORES = {2: "0|1", 4: "0|1|0|1"}


def start(checkpoint: Path, variables: dict[str, str], *, ranks: int = 2, **options: Any) -> Any:
    return EngineProcess(
        checkpoint,
        tensor_parallel_size=ranks,
        environment={"VLLM_CPU_OMP_THREADS_BIND": CORES[ranks], **variables},
        **options,
    )


def test_two_ranks_answer(constructed_checkpoint: Path) -> None:
    with start(
        constructed_checkpoint,
        SOMETIMES,
        max_num_batched_tokens=2048,
        worker_extension_cls="tests.integrations.vllm.sharing_worker.SharingWorker",
    ) as engine:
        engine.rpc("count_scans")
        require_right_answers(engine)
        first, second = engine.rpc("scans")
    assert first == second
    # the batch decodes above the bound; prompts, and what is asked again, are not shared
    assert first["shared"] > 0
    assert first["alone"] > 0


@pytest.mark.extended
@pytest.mark.parametrize("variables", [{}, INT8, PLANES], ids=["keys", "int8", "planes"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_choose_what_one_does(
    constructed_checkpoint: Path, tmp_path: Path, variables: dict[str, str], ranks: int
) -> None:
    """In chunks that end within pages; then, step by step of decoding, the same blocks."""
    prompt = needle_prompt(4096, num_tokens=4096)
    folders = {1: tmp_path / "one", ranks: tmp_path / "more"}
    for count, folder in folders.items():
        with EngineProcess(
            constructed_checkpoint,
            tensor_parallel_size=count,
            max_num_batched_tokens=192,
            environment={
                **variables,
                **recorded(folder),
                **(ALWAYS | {"VLLM_CPU_OMP_THREADS_BIND": CORES[ranks]} if count > 1 else {}),
            },
        ) as engine:
            (output,) = engine.generate(ids([prompt]), max_tokens=prompt.max_tokens)
            assert tuple(output.token_ids) == prompt.expected_ids
            if count > 1:
                require_right_answers(engine)
    require_equal_selections(folders[1], folders[ranks], ranks=ranks)


@pytest.mark.extended
def test_drafts_are_verified(tmp_path: Path) -> None:
    """The module's own layer shares its scans too, in all steps of a draft."""
    with start(
        drafting_checkpoint(tmp_path / "checkpoint", wrong_every=2),
        ALWAYS,
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    ) as engine:
        prompts = [needle_prompt(seed, num_tokens=1500 + 501 * seed) for seed in range(1, 5)]
        outputs = engine.generate(ids(prompts), max_tokens=[p.max_tokens for p in prompts])
        assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]
        drafts = engine.speculation()
        assert 0 < drafts.accepted < drafts.drafted
