"""Prompts on one server, decoding on another: NIXL moves K, V and index keys between them.

Both engines are real ones on this CPU, NIXL is the wheel as it is, with UCX over loopback. Prompts
are longer than the sparse layers read, among decoys. An engine that decodes computes no prompt:
what it answers rightly has been moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.host.serving import free_port
from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_sglang.compat import fleets_are_tested
from tests.integrations.sglang.engine import (
    Completion,
    EngineDiedError,
    EngineError,
    EngineProcess,
)
from tests.integrations.sglang.forgetful import Forgetful

ROOT = Path(__file__).parents[3]
NIXL = ROOT / ".venv" / "nixl"
PAGE = 128

pytestmark = [
    pytest.mark.skipif(not (NIXL / ".ready").exists(), reason="no .venv/nixl"),
    pytest.mark.skipif(not fleets_are_tested(), reason="refused on this SGLang"),
]


@dataclass(frozen=True)
class Pair:
    """Two engines, and the port at which the first tells where its caches are."""

    prefill: EngineProcess
    decode: EngineProcess
    port: int
    forgetful: Forgetful
    rooms: Iterator[int]

    def asked(self, prompts: Sequence[NeedlePrompt]) -> list[dict[str, Any]]:
        """Arguments of both engines' requests: the same room on both sides."""
        return [
            {
                "input_ids": list(prompt.token_ids),
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": self.port,
                "bootstrap_room": next(self.rooms),
            }
            for prompt in prompts
        ]

    def answers(
        self, *prompts: NeedlePrompt, max_tokens: int | None = None, **sampling: Any
    ) -> tuple[list[Completion], list[Completion]]:
        """What the first engine says of prompts, and what the second answers."""
        asked = self.asked(prompts)
        limits = [max_tokens or prompt.max_tokens for prompt in prompts]
        with ThreadPoolExecutor(1) as beside:
            read = beside.submit(self.prefill.generate, asked, max_tokens=1)
            answered = self.decode.generate(asked, max_tokens=limits, **sampling)
            return read.result(), answered


def tokens(answers: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [tuple(answer.token_ids) for answer in answers]


def start(checkpoint: Path, role: str, folder: Path, **options: Any) -> EngineProcess:
    variables = options.pop("environment", {})
    path = ":".join(filter(None, (variables.get("PYTHONPATH"), str(NIXL))))
    return EngineProcess(
        checkpoint,
        log=folder / f"{role}.log",
        # chunks of prompts
        chunked_prefill_size=1024,
        disaggregation_mode=role,
        disaggregation_transfer_backend="nixl",
        environment={
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": "lo",
            # a peer that died is noticed after two beats
            "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
            **variables,
            "PYTHONPATH": path,
        },
        **options,
    )


@contextmanager
def started(
    checkpoint: Path,
    folder: Path,
    *,
    variables: dict[str, str] | None = None,
    decoding: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Pair]:
    """Both engines, with the same options but for those of `decoding`."""
    variables = variables or {}
    port, forgetful = free_port(), Forgetful(folder / "plugin")
    extra = forgetful.install() | variables
    with (
        start(
            checkpoint,
            "prefill",
            folder,
            disaggregation_bootstrap_port=port,
            environment=extra,
            **options,
        ) as prefill,
        start(
            checkpoint, "decode", folder, environment=variables, **options, **(decoding or {})
        ) as decode,
    ):
        yield Pair(prefill, decode, port, forgetful, itertools.count(1))


@pytest.fixture(scope="module")
def pair(constructed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with started(constructed_checkpoint, tmp_path_factory.mktemp("pair")) as pair:
        yield pair


def test_prompts_read_there_are_answered_here(pair: Pair) -> None:
    prompts = [needle_prompt(seed, num_tokens=n) for seed, n in ((61, 2700), (62, 3300))]
    read, answered = pair.answers(*prompts)
    assert tokens(read) == [prompt.expected_ids[:1] for prompt in prompts]
    assert tokens(answered) == [prompt.expected_ids for prompt in prompts]


def test_a_prefix_that_was_read_before_is_moved_too(pair: Pair) -> None:
    """The first engine computes a page or two; the second keeps nothing and needs them all."""
    prompt = needle_prompt(63, num_tokens=3000)
    (before,), _ = pair.answers(prompt)
    (read,), answered = pair.answers(prompt)
    assert before.num_cached_tokens == 0
    assert read.num_cached_tokens >= 3000 - 2 * PAGE
    assert tokens(answered) == [prompt.expected_ids]


def test_index_keys_are_what_moved(pair: Pair) -> None:
    """Lost before they are sent, the needle is not found: the answers above needed them."""
    prompt = needle_prompt(64, num_tokens=3100)
    pair.forgetful.start()
    _, answered = pair.answers(prompt)
    assert pair.forgetful.stop() > 0
    assert tokens(answered) != [prompt.expected_ids]
    assert pair.prefill.flush()
    _, answered = pair.answers(prompt)
    assert tokens(answered) == [prompt.expected_ids]


def test_a_peer_that_died_is_an_error_and_no_answer(pair: Pair) -> None:
    """The last test of these engines: the first is killed before it was asked for a prompt."""
    prompt = needle_prompt(65, num_tokens=2900)
    (asked,) = pair.asked([prompt])
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(pair.decode.generate, [asked], max_tokens=prompt.max_tokens)
        pair.prefill.kill()
        with pytest.raises(EngineError, match="Lost connection with prefill"):
            waiting.result(60)


@pytest.mark.extended
def test_rows_that_arrive_are_looked_up(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """Without its index keys no word is answered."""
    variables = {"M3_PLUGIN_VERIFY_TRANSFER": str(tmp_path / "rows")}
    with started(constructed_checkpoint, tmp_path, variables=variables) as pair:
        prompt = needle_prompt(66, num_tokens=2700)
        _, answered = pair.answers(prompt)
        assert tokens(answered) == [prompt.expected_ids]
        pair.forgetful.start()
        with pytest.raises((EngineError, EngineDiedError)):
            pair.answers(needle_prompt(67, num_tokens=2800))
        assert "the index key is not the one that was stored" in pair.decode.log_text()


@pytest.mark.extended
def test_a_prefix_that_is_here_is_not_sent_again(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    """With a radix cache here, the index keys that are lost there are those of the rest alone."""
    with started(
        constructed_checkpoint,
        tmp_path,
        decoding={"disaggregation_decode_enable_radix_cache": True},
    ) as pair:
        prompt = needle_prompt(68, num_tokens=3000)
        for forgets in (False, True):
            if forgets:
                pair.forgetful.start()
            _, answered = pair.answers(prompt)
            assert tokens(answered) == [prompt.expected_ids]
        assert pair.forgetful.stop() > 0


@pytest.mark.extended
@pytest.mark.parametrize("index_keys", ["int8", "planes"])
def test_index_keys_with_scales_are_moved(
    constructed_checkpoint: Path, tmp_path: Path, index_keys: str
) -> None:
    variables = {"M3_PLUGIN_INDEX_KEYS": index_keys}
    with started(constructed_checkpoint, tmp_path, variables=variables) as pair:
        prompt = needle_prompt(69, num_tokens=3200)
        _, answered = pair.answers(prompt)
        assert tokens(answered) == [prompt.expected_ids]


@pytest.mark.extended
def test_ranks_send_to_ranks(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """Two ranks on either side, each with its heads and a copy of the index keys."""
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with started(constructed_checkpoint, tmp_path, variables=variables, tp_size=2) as pair:
        prompts = [needle_prompt(seed, num_tokens=2900) for seed in (70, 71)]
        _, answered = pair.answers(*prompts)
        assert tokens(answered) == [prompt.expected_ids for prompt in prompts]
