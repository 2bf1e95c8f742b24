"""MiniMax-M3.1 through the real engine: the cases of all hosts, and SGLang's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m3_plugin.testing.prompts import needle_prompt, picture_prompt
from tests.integrations.constructed import answer, check
from tests.integrations.m31 import M31Answers, M31Cases
from tests.integrations.quantised import DEQUANTISE
from tests.integrations.sglang.engine import EngineProcess
from tests.integrations.sglang.test_multimodal import request


class TestM31(M31Cases):
    """The cases of all hosts."""

    @pytest.fixture(scope="class")
    def engine(
        self, m31_random: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[EngineProcess]:
        log = tmp_path_factory.mktemp("m31") / "engine.log"
        with EngineProcess(m31_random(2) / "stored", log=log, environment=DEQUANTISE) as engine:
            yield engine


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
