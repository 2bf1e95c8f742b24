"""Experts shared out whole, and data parallel ranks: real engines and servers of two gloo ranks.

Only the expert of a word's class answers with that word: a lost expert is a wrong word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from m3_plugin.host.serving import ServerProcess, free_port, vllm_command
from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from tests.integrations.cases import LOGPROB_ATOL, random_prompt, recorded
from tests.integrations.constructed import answer, check
from tests.integrations.quantised import QuantisedCheckpoints
from tests.integrations.server import MODEL
from tests.integrations.vllm.engine import EngineProcess
from tests.integrations.vllm.test_server import SERVER_ENVIRONMENT

pytestmark = pytest.mark.extended

CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
EXPERTS_IN_WHOLE: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "worker_extension_cls": "tests.integrations.vllm.ranked_worker.RankedWorker",
    "max_num_batched_tokens": 2048,
    "environment": CORES,
}
# beyond the blocks that attention reads, decoys among them
PROMPTS = [needle_prompt(seed, num_tokens=n) for seed, n in enumerate((1400, 2300, 4000, 5000))]


@pytest.mark.parametrize("filtered", [False, True])
def test_expert_parallel(constructed_checkpoint: Path, filtered: bool) -> None:
    """Each rank holds half of the experts; with the filter it reads no others from the files."""
    with EngineProcess(
        constructed_checkpoint, enable_ep_weight_filter=filtered, **EXPERTS_IN_WHOLE
    ) as engine:
        check(PROMPTS, answer(engine, PROMPTS))
        ranks = engine.rpc("experts_here")
        left = engine.rpc("left_in_files")
    assert len(ranks) == 2
    for rank in ranks:
        assert rank
        assert all(method == "LocalExperts" for method, _, _ in rank)
        assert all(2 * here == all_of_them for _, here, all_of_them in rank)
    numbers = [{int(re.findall(r"experts\.(\d+)\.", name)[0]) for name in names} for names in left]
    experts = ranks[0][0][2]
    half = set(range(experts // 2))
    assert numbers == ([set(range(experts)) - half, half] if filtered else [set(), set()])


def test_expert_parallel_gives_the_tokens_of_transformers(
    random_checkpoint: Callable[[str], Path],
) -> None:
    """And a reload of the same folder leaves them as they are."""
    cases = recorded()
    prompts = [random_prompt(case["length"], seed=case["seed"]) for case in cases]
    checkpoint = random_checkpoint("engine")
    with EngineProcess(checkpoint, enable_ep_weight_filter=True, **EXPERTS_IN_WHOLE) as engine:

        def tokens() -> list[list[int]]:
            outputs = engine.generate(prompts, max_tokens=8, ignore_eos=True)
            return [output.token_ids for output in outputs]

        assert tokens() == [case["token_ids"] for case in cases]
        for prompt, case in zip(prompts, cases, strict=True):
            found = engine.prompt_logprobs(prompt)
            assert found == pytest.approx(case["logprobs"], abs=LOGPROB_ATOL)
        engine.rpc("reload_weights")
        assert engine.flush()
        assert tokens() == [case["token_ids"] for case in cases]


@pytest.mark.parametrize("variables", [{}, {"M3_PLUGIN_DEQUANTIZE": "1"}])
def test_expert_parallel_of_stored_weights(
    constructed_quantised: QuantisedCheckpoints, variables: dict[str, str]
) -> None:
    """The filter leaves another rank's weights in the files, and not their scales."""
    options = EXPERTS_IN_WHOLE | {"environment": CORES | variables}
    with EngineProcess(
        constructed_quantised.stored("mxfp8"), enable_ep_weight_filter=True, **options
    ) as engine:
        check(PROMPTS, answer(engine, PROMPTS))
        methods = {method for rank in engine.rpc("experts_here") for method, _, _ in rank}
        left = engine.rpc("left_in_files")
    assert methods == {"LocalExperts" if variables else "StoredExpertsMethod"}
    assert all(names for names in left)


OPTIONS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "8192"),
    *("--max-num-batched-tokens", "1024"),
    *("--kv-cache-memory-bytes", str(128 << 20)),
    *("--limit-mm-per-prompt", '{"image": 0, "video": 0}'),
    *("--data-parallel-size", "2"),
    "--enforce-eager",
)


class Ranks:
    """A server of two data parallel ranks."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server

    def ask(self, prompt: NeedlePrompt, rank: int | None = None) -> str:
        """The answer, of one rank or of the one that vLLM chooses."""
        reply = httpx.post(
            f"{self.server.url}/v1/chat/completions",
            headers={} if rank is None else {"X-data-parallel-rank": str(rank)},
            json={
                "model": MODEL,
                "messages": prompt.messages(),
                "max_tokens": prompt.max_tokens,
                "temperature": 0,
                "chat_template_kwargs": {"thinking_mode": "disabled"},
            },
            timeout=300,
        )
        reply.raise_for_status()
        return reply.json()["choices"][0]["message"]["content"]

    def served(self) -> dict[str, float]:
        """Rank -> requests that it has answered."""
        lines = httpx.get(f"{self.server.url}/metrics").text.splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("vllm:request_success_total{"):
                rank = re.findall(r'engine="(\d+)"', line)[0]
                found[rank] = found.get(rank, 0) + float(line.rpartition(" ")[2])
        return found


@pytest.fixture(
    scope="module",
    params=[(), ("--enable-expert-parallel", "--enable-ep-weight-filter")],
    ids=["experts cut", "experts whole"],
)
def ranks(
    request: pytest.FixtureRequest,
    constructed_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ranks]:
    port = free_port()
    with ServerProcess(
        vllm_command(constructed_checkpoint, port=port, options=(*OPTIONS, *request.param)),
        port=port,
        log=tmp_path_factory.mktemp("ranks") / "server.log",
        environment={**SERVER_ENVIRONMENT, "M3_PLUGIN_CHECK": "1"},
    ) as server:
        server.wait_until_ready(timeout_s=600)
        yield Ranks(server)


def test_the_experts_of_all_ranks_were_proved(ranks: Ranks) -> None:
    text = ranks.server.log.read_text()
    assert "clamp probe skipped" not in text
    assert text.count("serving MiniMax-M3 with 2 MSA") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_answers_while_the_other_has_nothing_to_do(ranks: Ranks, rank: int) -> None:
    """The idle one runs a step that nobody asked for with each of ours: its experts are needed."""
    before = ranks.served()
    prompt = needle_prompt(801 + rank, num_tokens=3300)
    assert ranks.ask(prompt, rank) == prompt.expected_text
    after = ranks.served()
    assert {name: after[name] - before.get(name, 0) for name in after} == {
        str(rank): 1,
        str(1 - rank): 0,
    }


def test_ranks_with_unequal_steps(ranks: Ranks) -> None:
    """Prompts of many lengths at once: chunks of one rank beside decoding of the other."""
    lengths: Sequence[int] = (1400, 5000, 2300, 3000, 4100, 2049, 2800, 1408)
    prompts = [needle_prompt(900 + i, num_tokens=n) for i, n in enumerate(lengths)]
    before = ranks.served()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ranks.ask, prompts))
    assert answers == [prompt.expected_text for prompt in prompts]
    after = ranks.served()
    assert all(after[name] > before.get(name, 0) for name in ("0", "1"))
