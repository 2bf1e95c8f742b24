"""MiniMax-M3.1 through the real engine: the cases of all hosts, and SGLang's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import needle_prompt, picture_prompt
from tests.integrations.constructed import answer, check
from tests.integrations.m31 import CACHES, DECODED, M31Answers, M31Cases
from tests.integrations.quantised import DEQUANTISE
from tests.integrations.sglang.engine import HOST, EngineProcess
from tests.integrations.sglang.rehearsal import CHIPS
from tests.integrations.sglang.test_multimodal import request


@pytest.mark.extended
class TestM31(M31Cases):
    """The cases of all hosts."""

    @pytest.fixture(scope="class")
    def engine(
        self, m31_random: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[EngineProcess]:
        log = tmp_path_factory.mktemp("m31") / "engine.log"
        with EngineProcess(
            m31_random(self.init) / "stored", log=log, environment=DEQUANTISE
        ) as engine:
            yield engine


@pytest.mark.extended
class TestNoFirstBlock(TestM31):
    """The same for a checkpoint that forces none, as the published one probably does."""

    init = 0


class TestM31Answers(M31Answers):
    """The cases of all hosts, and a picture."""

    @pytest.fixture(scope="class")
    def engine(
        self, m31_constructed: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[EngineProcess]:
        log = tmp_path_factory.mktemp("m31") / "engine.log"
        with EngineProcess(
            m31_constructed, log=log, context_length=10240, environment=DEQUANTISE
        ) as engine:
            yield engine

    def test_one_of_several_pictures(self, engine: EngineProcess) -> None:
        prompt = picture_prompt(("green", "magenta", "yellow"), ask=1, num_filler_tokens=1500)
        (output,) = engine.generate([request(prompt)], max_tokens=prompt.max_tokens)
        assert tuple(output.token_ids) == prompt.expected_ids


def test_sglang_s_own_layers_hold_what_the_checkpoint_stores(
    m31_random: Callable[[int], Path], tmp_path: Path
) -> None:
    """Every byte of values and scales, the experts in SGLang's own scheme; decoded as by SGLang."""
    module = "tests.integrations.sglang.host_layers_m31"
    found: dict[str, Any] = HOST.report(module, m31_random(2) / "stored", folder=tmp_path)
    experts = "model.layers.2.block_sparse_moe.experts"
    assert len(found["experts"]) == 2 * 2 * 4
    assert f"{experts}.w13_weight_packed" in found["experts"]
    assert all(found["experts"].values()), found["experts"]
    assert "model.layers.0.self_attn.index_qkv_proj" in found["layers"]
    assert all(found["layers"].values()), found["layers"]
    assert found["decoders"] == DECODED


def test_each_chip_gets_kernels_that_it_has(
    m31_random: Callable[[int], Path], tmp_path: Path
) -> None:
    """Weight-only through Marlin; on SM100 SGLang's own model, which does without this plugin."""
    module = "tests.integrations.sglang.rehearsal_m31"
    found: dict[str, Any] = HOST.report(module, m31_random(2) / "stored", folder=tmp_path)
    for name in CHIPS:
        for command, cache in (("plain", "auto"), ("fp8 cache", "fp8_e4m3")):
            facts = found[f"{name}, {command}"]
            assert isinstance(facts, dict), facts
            if name == "B200":
                assert facts["model"] == "sglang.srt.models.minimax_m3_vl"
                assert facts["quantization"] == "minimax_m3_nvfp4"
                assert facts["attention_backend"] == "trtllm_mha"
                continue
            assert facts == {
                "model": "m3_sglang.models.minimax_m3",
                "quantization": "m3_mxfp8",
                "moe_runner_backend": "marlin",
                "moe_a2a_backend": "none",
                "attention_backend": "msa",
                "page_size": 128,
                "kv_cache_dtype": cache,
            }, name


@pytest.mark.extended
def test_tensor_parallel(m31_constructed: Path, tmp_path: Path) -> None:
    """Two ranks hold two KV heads and index heads each, in every layer."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in ((0, 1408), (1, 5000))]
    with EngineProcess(
        m31_constructed,
        log=tmp_path / "engine.log",
        tp_size=2,
        environment=DEQUANTISE | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    ) as engine:
        check(prompts, answer(engine, prompts))


@pytest.mark.extended
@pytest.mark.parametrize("cache", CACHES)
def test_caches_that_hold_less_answer_the_same(
    m31_constructed: Path, tmp_path: Path, cache: dict[str, str]
) -> None:
    """Beyond the budget, in chunks and from the cache."""
    prompts = [needle_prompt(seed, num_tokens=tokens) for seed, tokens in ((0, 1408), (1, 5000))]
    with EngineProcess(
        m31_constructed,
        log=tmp_path / "engine.log",
        environment=DEQUANTISE | cache,
    ) as engine:
        check(prompts, answer(engine, prompts))
        check(prompts, answer(engine, prompts))
