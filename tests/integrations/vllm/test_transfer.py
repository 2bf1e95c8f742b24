"""Prefill on one engine, decode on another: NIXL moves K, V and index keys between them.

Both engines are real ones on this CPU, NIXL is the wheel as it is, with UCX over loopback. Prompts
are longer than the sparse layers read, among decoys.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from m3_plugin.host.serving import free_port
from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from tests.integrations.vllm.engine import Completion, EngineError, EngineProcess

ROOT = Path(__file__).parents[3]
NIXL = ROOT / ".venv" / "nixl"
PAGE = 128

pytestmark = pytest.mark.skipif(not (NIXL / ".ready").exists(), reason="no .venv/nixl")


def start(
    checkpoint: Path,
    role: str,
    *,
    variables: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> EngineProcess:
    return EngineProcess(
        checkpoint,
        **options,
        # chunks on both sides
        max_num_batched_tokens=1024,
        worker_extension_cls="tests.integrations.vllm.transferring_worker.TransferringWorker",
        kv_transfer_config={
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "recompute",
        },
        environment={
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": "lo",
            **variables,
        },
    )


@pytest.fixture(scope="module")
def engines(constructed_checkpoint: Path) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    with pytest.MonkeyPatch.context() as patch:
        # appended: the hosts' own libraries go first
        patch.setattr(sys, "path", [*sys.path, str(NIXL)])
        with (
            start(constructed_checkpoint, "kv_producer") as prefill,
            start(constructed_checkpoint, "kv_consumer") as decode,
        ):
            yield prefill, decode


def read_there(prefill: EngineProcess, prompt: NeedlePrompt) -> dict[str, Any]:
    """Let the first engine read a prompt; what the second needs to fetch it."""
    wanted = {"do_remote_decode": True, "do_remote_prefill": False}
    (read,) = prefill.generate(
        [list(prompt.token_ids)], max_tokens=1, extra_args={"kv_transfer_params": wanted}
    )
    assert read.token_ids == list(prompt.expected_ids[:1])
    assert read.kv_transfer_params is not None
    return read.kv_transfer_params


def answer_here(decode: EngineProcess, prompt: NeedlePrompt, params: Any) -> Completion:
    (answer,) = decode.generate(
        [list(prompt.token_ids)],
        max_tokens=prompt.max_tokens,
        extra_args={"kv_transfer_params": params},
    )
    return answer


def fetched(decode: EngineProcess) -> float:
    return decode.metric("vllm:external_prefix_cache_hits")


@pytest.mark.parametrize(("seed", "length"), [(61, 2700), (62, 3300)])
def test_a_prompt_read_elsewhere_is_answered_here(
    engines: tuple[EngineProcess, EngineProcess], seed: int, length: int
) -> None:
    prefill, decode = engines
    prompt = needle_prompt(seed, num_tokens=length)
    before = fetched(decode)
    answer = answer_here(decode, prompt, read_there(prefill, prompt))
    assert tuple(answer.token_ids) == prompt.expected_ids
    assert fetched(decode) - before >= length - PAGE


def test_only_what_is_missing_is_fetched(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """The pages of a prefix that this engine has read itself stay its own."""
    prefill, decode = engines
    prompt = needle_prompt(63, num_tokens=3000)
    shared = 10 * PAGE
    decode.generate([list(prompt.token_ids[:shared])], max_tokens=1)
    before = fetched(decode)
    answer = answer_here(decode, prompt, read_there(prefill, prompt))
    assert tuple(answer.token_ids) == prompt.expected_ids
    assert 0 < fetched(decode) - before <= 3000 - shared + PAGE


def test_index_keys_are_what_moved(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """Lost before they are fetched, the needle is not found: the answers above needed them."""
    prefill, decode = engines
    prompt = needle_prompt(64, num_tokens=3100)
    params = read_there(prefill, prompt)
    assert prefill.rpc("forget_index_keys") == [2]
    answer = answer_here(decode, prompt, params)
    assert tuple(answer.token_ids) != prompt.expected_ids
    assert decode.flush()


def test_a_peer_that_died_costs_a_prompt_and_no_answer(
    engines: tuple[EngineProcess, EngineProcess],
) -> None:
    """The last test of these engines: the first is killed with a prompt that was not fetched."""
    prefill, decode = engines
    prompt = needle_prompt(65, num_tokens=2900)
    params = read_there(prefill, prompt)
    prefill.kill()
    answer = answer_here(decode, prompt, params)
    assert tuple(answer.token_ids) == prompt.expected_ids


@pytest.mark.extended
def test_rows_that_arrive_are_looked_up(
    constructed_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last page of a prompt is not full; without its index keys no word is answered."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(NIXL)])
    rows = {"M3_PLUGIN_VERIFY_TRANSFER": str(tmp_path / "rows")}
    with (
        start(constructed_checkpoint, "kv_producer", variables=rows) as prefill,
        start(constructed_checkpoint, "kv_consumer", variables=rows) as decode,
    ):
        prompt = needle_prompt(65, num_tokens=2700)
        answer = answer_here(decode, prompt, read_there(prefill, prompt))
        assert tuple(answer.token_ids) == prompt.expected_ids
        other = needle_prompt(66, num_tokens=2800)
        params = read_there(prefill, other)
        prefill.rpc("forget_index_keys")
        with pytest.raises(EngineError, match="the index key is not the one that was stored"):
            answer_here(decode, other, params)
