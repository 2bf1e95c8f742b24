"""A real vLLM engine in a process of its own, driven over a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from m3_plugin.testing.prompts import NeedlePrompt
from tests.integrations.engine_pipe import EngineDiedError, EngineError, EnginePipe, answer_requests
from tests.integrations.forked import Interpreter, fork_children

__all__ = ["HOST", "Completion", "EngineDiedError", "EngineError", "EngineProcess", "Speculation"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    # a wrong decision of the plugin must end the engine, not show as vLLM's own model
    "M3_PLUGIN_REQUIRED": "1",
    # spinning worker threads starve each other on machines with few cores
    "OMP_WAIT_POLICY": "PASSIVE",
}
PRELOAD = ("vllm", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker")
# programs with this host imported, as engines have it
HOST = Interpreter(
    PRELOAD, {name: ENVIRONMENT[name] for name in ("HF_HUB_OFFLINE", "OMP_WAIT_POLICY")}
)


@dataclass(frozen=True)
class Completion:
    """One finished request as vLLM reports it."""

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, float]]
    num_prompt_tokens: int
    num_cached_tokens: int
    finish_reason: str | None
    kv_transfer_params: dict[str, Any] | None


@dataclass(frozen=True)
class Speculation:
    """vLLM's own counts of drafts since the engine started.

    `lengths[i]` counts the drafts of which exactly i tokens were accepted.
    """

    drafts: int
    drafted: int
    accepted: int
    lengths: tuple[int, ...]

    def since(self, before: Speculation) -> Speculation:
        """What was counted after `before`."""
        lengths = zip(self.lengths, before.lengths, strict=True)
        return Speculation(
            drafts=self.drafts - before.drafts,
            drafted=self.drafted - before.drafted,
            accepted=self.accepted - before.accepted,
            lengths=tuple(now - then for now, then in lengths),
        )


class EngineProcess(EnginePipe):
    """`vllm.LLM` behind a pipe.

    Parameters
    ----------
    model : checkpoint folder
    environment : additions to `ENVIRONMENT`
    options : arguments of `vllm.LLM`
    """

    def __init__(
        self, model: Path, *, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.model = model
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 8192,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 256 << 20,
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "worker_extension_cls": "m3_vllm.worker.M3WorkerExtension",
            **options,
        }
        super().__init__(
            _serve, arguments, environment=ENVIRONMENT | (environment or {}), preload=PRELOAD
        )

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_tokens: int | Sequence[int] = 8,
        adapters: Sequence[Path | None] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Generate for all prompts together, greedily unless told otherwise.

        Parameters
        ----------
        prompts : lists of token ids, or anything `LLM.generate` takes
        max_tokens : one number, or one per prompt
        adapters : folder of each prompt's LoRA adapter, None for the model alone
        """
        return self._call("generate", list(prompts), max_tokens, sampling, adapters)

    def add_adapter(self, folder: Path) -> bool:
        """Load a LoRA adapter, as `/v1/load_lora_adapter` has it done."""
        return self._call("add_adapter", folder)

    def embed(self, prompt: list[int]) -> list[float]:
        """The embedding of a prompt; the engine must be a pooling one."""
        return self._call("embed", prompt)

    def flush(self) -> bool:
        """Empty the prefix cache; False if vLLM refuses because a request holds pages."""
        return self._call("flush")

    def chat(self, messages: list[dict], *, max_tokens: int = 8, **options: Any) -> Completion:
        """One chat through the checkpoint's template, greedily."""
        return self._call("chat", messages, max_tokens, options)

    def prompt_logprobs(self, prompt: Any) -> list[float]:
        """Log probability of every prompt token after the first.

        Parameters
        ----------
        prompt : a list of token ids, or anything `LLM.generate` takes
        """
        return self._call("prompt_logprobs", prompt)

    def next_logprobs(self, prompts: list[list[int]], token_ids: list[int]) -> list[list[float]]:
        """Log probability of each of `token_ids` as the token after each prompt.

        The engine must have been started with `max_logprobs=-1`.
        """
        outputs = self.generate(prompts, max_tokens=1, logprobs=-1)
        return [[output.logprobs[0][token] for token in token_ids] for output in outputs]

    def abort_midway(
        self, prompts: Sequence[Any], *, steps: int, max_tokens: int, beside: NeedlePrompt
    ) -> tuple[list[int], Completion]:
        """Start requests, run some engine steps, abort them while another one runs on to its end.

        Parameters
        ----------
        prompts : lists of token ids, which are aborted
        steps : engine steps before that
        max_tokens : of each aborted request, more than it gets
        beside : starts with them and is not aborted

        Returns
        -------
        tokens that each aborted request had produced, and the other one's whole answer
        """
        ids = list(beside.token_ids)
        return self._call("abort_midway", list(prompts), steps, max_tokens, ids, beside.max_tokens)

    def metric(self, name: str) -> float:
        """Sum of one of vLLM's own Prometheus counters in the engine process."""
        return self._call("metric", name)

    def speculation(self) -> Speculation:
        """Drafts and accepted tokens up to now."""
        return self._call("speculation")

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """`collective_rpc` to every worker."""
        return self._call("rpc", method, args)

    def model_class(self) -> str:
        """Qualified name of the class vLLM built for the checkpoint."""
        return self._call("model_class")


def _serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    def start() -> _Engine:
        from vllm import LLM

        fork_children()
        return _Engine(LLM(**arguments, disable_log_stats=False))

    answer_requests(pipe, start)


class _Engine:
    def __init__(self, llm: Any) -> None:
        self.llm = llm

        self.adapters: dict[Path, Any] = {}

    def generate(
        self,
        prompts: list[Any],
        max_tokens: Any,
        sampling: dict,
        adapters: Sequence[Path | None] | None = None,
    ) -> list[Completion]:
        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        params = [_sampling(limit, sampling) for limit in limits]
        inputs = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in prompts]
        requests = None if adapters is None else [self._adapter(folder) for folder in adapters]
        outputs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=requests)
        return [_completion(output) for output in outputs]

    def _adapter(self, folder: Path | None) -> Any:
        """vLLM's name for an adapter: a number of its own for each folder."""
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        number = len(self.adapters) + 1
        return self.adapters.setdefault(folder, LoRARequest(f"{number}", number, str(folder)))

    def add_adapter(self, folder: Path) -> bool:
        return self.llm.llm_engine.add_lora(self._adapter(folder))

    def prompt_logprobs(self, prompt: Any) -> list[float]:
        params = _sampling(1, {"prompt_logprobs": 0})
        asked = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        (output,) = self.llm.generate(asked, params, use_tqdm=False)
        steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [step[token].logprob for token, step in steps]

    def embed(self, prompt: list[int]) -> list[float]:
        (output,) = self.llm.embed({"prompt_token_ids": prompt}, use_tqdm=False)
        return output.outputs.embedding

    def flush(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    def chat(self, messages: list[dict], max_tokens: int, options: dict) -> Completion:
        params = _sampling(max_tokens, {})
        return _completion(self.llm.chat(messages, params, use_tqdm=False, **options)[0])

    def abort_midway(
        self,
        prompts: list[Any],
        steps: int,
        max_tokens: int,
        beside: list[int],
        beside_max_tokens: int,
    ) -> tuple[list[int], Completion]:
        engine = self.llm.llm_engine
        latest: dict[str, Any] = {}

        def step() -> None:
            latest.update({output.request_id: output for output in engine.step()})

        names = [f"abort-{index}" for index in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, _sampling(max_tokens, {}))
        other = {"prompt_token_ids": beside}
        engine.add_request("beside", other, _sampling(beside_max_tokens, {}))
        for _ in range(steps):
            step()
        produced = [
            len(latest[name].outputs[0].token_ids) if name in latest else 0 for name in names
        ]
        if "beside" in latest and latest["beside"].finished:
            raise RuntimeError(f"the request beside had ended after {steps} steps: abort earlier")
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            step()
        return produced, _completion(latest["beside"])

    def metric(self, name: str) -> float:
        return float(sum(m.value for m in self.llm.get_metrics() if m.name == name))

    def speculation(self) -> Speculation:
        prefix = "vllm:spec_decode_num_"
        metrics = {m.name.removeprefix(prefix): m for m in self.llm.get_metrics()}
        drafts = metrics["drafts"].value
        per_position = metrics["accepted_tokens_per_pos"].values
        at_least = [drafts, *per_position, 0]
        return Speculation(
            drafts=drafts,
            drafted=metrics["draft_tokens"].value,
            accepted=metrics["accepted_tokens"].value,
            lengths=tuple(a - b for a, b in pairwise(at_least)),
        )

    def rpc(self, method: str, args: tuple) -> list[Any]:
        return self.llm.collective_rpc(method, args=args)

    def model_class(self) -> str:
        return self.llm.collective_rpc("m3_model_class")[0]


def _sampling(max_tokens: int, options: dict) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **options})


def _completion(output: Any) -> Completion:
    first = output.outputs[0]
    return Completion(
        token_ids=list(first.token_ids),
        text=first.text,
        logprobs=[
            {token: entry.logprob for token, entry in step.items()} for step in first.logprobs or []
        ],
        num_prompt_tokens=len(output.prompt_token_ids),
        num_cached_tokens=output.num_cached_tokens or 0,
        finish_reason=first.finish_reason,
        kv_transfer_params=output.kv_transfer_params,
    )
