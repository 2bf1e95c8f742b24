"""A model spread over two processes on gloo: pipeline stages, experts by rank, replicas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_plugin.testing.prompts import needle_prompt, picture_prompt
from m3_plugin.testing.quantised import QuantName
from m3_plugin.testing.random_checkpoint import PRESETS, write_random_checkpoint
from m3_sglang.compat import fleets_are_tested
from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.quantised import QuantisedCheckpoints
from tests.integrations.sglang.engine import EngineProcess
from tests.integrations.sglang.test_multimodal import request

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(not fleets_are_tested(), reason="refused on this SGLang"),
]
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def start(checkpoint: Path, folder: Path, **options: Any) -> EngineProcess:
    variables = CORES | options.pop("environment", {})
    log = folder / "engine.log"
    return EngineProcess(
        checkpoint, log=log, chunked_prefill_size=1024, environment=variables, **options
    )


def require_right_answers(engine: EngineProcess, *, cached: int | None = 2048) -> None:
    """Facts among decoys beyond what MSA layers read, in a batch, then with a cached prefix.

    Parameters
    ----------
    cached : tokens that the second time must find; None where it may go to another cache
    """
    prompts = [needle_prompt(seed, num_tokens=2500 + 300 * seed) for seed in (1, 2, 3)]
    ids = [list(prompt.token_ids) for prompt in prompts]
    wanted = [prompt.expected_ids for prompt in prompts]
    for least in (0, cached):
        answers = engine.generate(ids, max_tokens=[prompt.max_tokens for prompt in prompts])
        assert [tuple(answer.token_ids) for answer in answers] == wanted
        if least is not None:
            assert min(answer.num_cached_tokens for answer in answers) >= least


def require_equal_logprobs(engine: EngineProcess, checkpoint: Path) -> None:
    """Those of transformers, for a prompt beyond 16 blocks."""
    prompt = random_prompt(2500, seed=5)
    ours = torch.tensor(engine.prompt_logprobs(prompt))
    wanted = golden.token_logprobs(checkpoint, prompt)
    torch.testing.assert_close(ours, wanted, atol=LOGPROB_ATOL, rtol=0)


@pytest.mark.parametrize("partition", ["1,2", "2,1"])
def test_stages_answer(constructed_checkpoint: Path, tmp_path: Path, partition: str) -> None:
    """Of three layers the first is dense: one stage without MSA layers, then one with both."""
    variables = {"SGLANG_PP_LAYER_PARTITION": partition}
    with start(constructed_checkpoint, tmp_path, pp_size=2, environment=variables) as engine:
        require_right_answers(engine)
        said = engine.log_text()
    kinds = {"1,2": [(2, 0)], "2,1": [(1, 1), (1, 0)]}[partition]
    for sparse, dense in kinds:
        assert f"serving MiniMax-M3 with {sparse} MSA and {dense} dense" in said


def test_pictures_are_seen_through_stages(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """The first stage embeds them: alone, several, and beyond what MSA layers read."""
    prompts = [
        picture_prompt(("red",)),
        picture_prompt(("green", "magenta", "yellow"), ask=1),
        picture_prompt(("blue",), num_filler_tokens=2500),
        picture_prompt(("cyan",), modality="video"),
    ]
    with start(constructed_checkpoint, tmp_path, pp_size=2) as engine:
        for prompt in prompts:
            (answer,) = engine.generate([request(prompt)], max_tokens=prompt.max_tokens)
            assert tuple(answer.token_ids) == prompt.expected_ids


def test_stages_compute_what_one_process_does(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = random_checkpoint("kernel")
    with start(checkpoint, tmp_path, pp_size=2) as engine:
        require_equal_logprobs(engine, checkpoint)


def test_experts_of_ranks_answer(constructed_checkpoint: Path, tmp_path: Path) -> None:
    with start(constructed_checkpoint, tmp_path, tp_size=2, ep_size=2) as engine:
        require_right_answers(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_ranks_compute_what_one_process_does(tmp_path: Path, dtype: str) -> None:
    """Each rank holds fewer experts than a token is given to."""
    shape = replace(PRESETS["kernel"], num_local_experts=4, num_experts_per_tok=3)
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", preset=shape)
    with start(checkpoint, tmp_path, tp_size=2, ep_size=2, dtype=dtype) as engine:
        if dtype == "float32":
            require_equal_logprobs(engine, checkpoint)
        else:
            assert engine.generate([random_prompt(2500, seed=5)], max_tokens=2)


@pytest.mark.parametrize("quant", ["mxfp8", "nvfp4"])
def test_quantised_experts_of_ranks_answer(
    constructed_quantised: QuantisedCheckpoints, tmp_path: Path, quant: QuantName
) -> None:
    """In the bytes of the files; only a word's expert answers with it."""
    checkpoint = constructed_quantised.stored(quant)
    with start(checkpoint, tmp_path, tp_size=2, ep_size=2) as engine:
        require_right_answers(engine)


def test_replicas_answer(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """Two schedulers with caches of their own; requests go to one after the other."""
    with start(constructed_checkpoint, tmp_path, dp_size=2) as engine:
        prompts = [needle_prompt(seed, num_tokens=2500 + 200 * seed) for seed in (1, 2, 3, 4)]
        for prompt in itertools.chain(prompts, prompts):
            (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
            assert tuple(answer.token_ids) == prompt.expected_ids
        assert engine.log_text().count("serving MiniMax-M3 with 2 MSA") == 2


def test_groups_that_attend_apart_answer(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """Both ranks busy with requests of their own, then one of them idle."""
    with start(constructed_checkpoint, tmp_path, tp_size=2, attn_dp_size=2) as engine:
        require_right_answers(engine, cached=None)
        for seed in (5, 6):
            prompt = needle_prompt(seed, num_tokens=2700)
            (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
            assert tuple(answer.token_ids) == prompt.expected_ids


def test_groups_that_attend_apart_compute_what_one_process_does(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = random_checkpoint("kernel")
    with start(checkpoint, tmp_path, tp_size=2, enable_dp_attention=True, dp_size=2) as engine:
        require_equal_logprobs(engine, checkpoint)
