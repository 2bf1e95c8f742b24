"""MiniMax-M3.1 through the real engine: the cases of all hosts, and vLLM's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import needle_prompt, picture_prompt
from tests.integrations.constructed import answer, check
from tests.integrations.m31 import CACHES, DECODED, M31Answers, M31Cases
from tests.integrations.quantised import DEQUANTISE
from tests.integrations.vllm.engine import HOST, EngineProcess
from tests.integrations.vllm.test_constructed import picture_request


class TestM31(M31Cases):
    """The cases of all hosts."""

    @pytest.fixture(scope="class")
    def engine(self, m31_random: Callable[[int], Path]) -> Iterator[EngineProcess]:
        with EngineProcess(
            m31_random(self.init) / "stored", environment=DEQUANTISE, max_num_batched_tokens=2048
        ) as engine:
            yield engine


@pytest.mark.extended
class TestNoFirstBlock(TestM31):
    """The same for a checkpoint that forces none, as the published one probably does."""

    init = 0


class TestM31Answers(M31Answers):
    """The cases of all hosts, and a picture."""

    @pytest.fixture(scope="class")
    def engine(self, m31_constructed: Path) -> Iterator[EngineProcess]:
        with EngineProcess(
            m31_constructed,
            environment=DEQUANTISE,
            max_model_len=10240,
            max_num_batched_tokens=2048,
            limit_mm_per_prompt={"image": 4, "video": 0},
        ) as engine:
            yield engine

    def test_one_of_several_pictures(self, engine: EngineProcess) -> None:
        prompt = picture_prompt(("green", "magenta", "yellow"), ask=1, num_filler_tokens=1500)
        (output,) = engine.generate([picture_request(prompt)], max_tokens=prompt.max_tokens)
        assert tuple(output.token_ids) == prompt.expected_ids


def test_vllm_s_own_layers_hold_what_the_checkpoint_stores(
    m31_random: Callable[[int], Path], tmp_path: Path
) -> None:
    """Every projection, expert and scale in its place, decoded by vLLM as by us."""
    module, folder = "tests.integrations.vllm.host_layers_m31", m31_random(2)
    found: dict[str, Any] = HOST.report(
        module, folder / "stored", folder / "reference", folder=tmp_path
    )
    assert found["decoders"] == DECODED
    assert len(found["experts"]) == 2 * 2 * 4
    assert all(found["experts"].values()), found["experts"]
    compared: dict[str, Any] = found["layers"]
    layers = {name: entry["format"] for name, entry in compared.items()}
    for layer in range(4):
        # the index branch of every layer in one projection with the rest
        assert layers[f"model.layers.{layer}.self_attn.qkv_proj"] == "mxfp8"
    assert layers["model.layers.0.mlp.down_proj"] == "mxfp8"
    assert layers["model.layers.2.block_sparse_moe.experts"] == "nvfp4"
    assert layers["model.layers.2.block_sparse_moe.shared_experts.down_proj"] == "mxfp8"
    assert layers["lm_head"] == "plain"
    # the reference multiplies where experts divide; all else is the same number
    rounding = {"nvfp4": 1e-6}
    wrong = {
        name: entry
        for name, entry in compared.items()
        if entry["difference"] > rounding.get(entry["format"], 0)
    }
    assert wrong == {}


@pytest.mark.extended
def test_tensor_parallel(m31_constructed: Path) -> None:
    """Two ranks hold two KV heads and index heads each, in every layer."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in ((0, 1408), (1, 5000))]
    with EngineProcess(
        m31_constructed,
        tensor_parallel_size=2,
        max_num_batched_tokens=2048,
        environment=DEQUANTISE | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as engine:
        check(prompts, answer(engine, prompts))


@pytest.mark.extended
@pytest.mark.parametrize("cache", CACHES)
def test_caches_that_hold_less_answer_the_same(
    m31_constructed: Path, cache: dict[str, str]
) -> None:
    """Beyond the budget, in chunks and from the cache."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in ((0, 1408), (1, 5000))]
    with EngineProcess(
        m31_constructed,
        max_num_batched_tokens=2048,
        environment=DEQUANTISE | cache,
    ) as engine:
        check(prompts, answer(engine, prompts))
        check(prompts, answer(engine, prompts))
