"""A real SGLang engine in a process of its own, driven over a pipe.

The engine starts its scheduler and detokenizer itself; all of them find the plugin the way users
get it: through its entry point, by SGLang's own loader.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.integrations.engine_pipe import EngineDiedError, EngineError, EnginePipe, answer_requests
from tests.integrations.forked import Interpreter, fork_children

__all__ = ["HOST", "Completion", "EngineDiedError", "EngineError", "EngineProcess", "speculation"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # a wrong decision of the plugin must end the engine, not show as SGLang's own model
    "M3_PLUGIN_REQUIRED": "1",
    # spinning worker threads starve each other on machines with few cores
    "OMP_WAIT_POLICY": "PASSIVE",
}
PRELOAD = (
    "sglang",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
)
# programs with this host imported, as engines have it
HOST = Interpreter(
    PRELOAD, {name: ENVIRONMENT[name] for name in ("HF_HUB_OFFLINE", "OMP_WAIT_POLICY")}
)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "context_length": 8192,
    "max_total_tokens": 16384,
    "max_running_requests": 8,
    "mem_fraction_static": 0.1,
    "chunked_prefill_size": 2048,
    "log_level": "info",
    # the scheduler would spin on a core between requests
    "sleep_on_idle": True,
}


def speculation(draft: Path, *, steps: int, algorithm: str = "NEXTN") -> dict[str, Any]:
    """Engine options for chains of `steps` drafts."""
    return {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": steps,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": steps + 1,
        "disable_cuda_graph": True,
    }


@dataclass(frozen=True)
class Completion:
    """One finished request as SGLang reports it; the last three are empty without speculation.

    `accepted_lengths[i]` counts verified chains of which i drafts were accepted.
    """

    token_ids: list[int]
    text: str
    num_cached_tokens: int
    num_prompt_tokens: int
    finish_reason: str | None
    input_logprobs: list[float]
    num_verify_steps: int
    num_accepted: int
    accepted_lengths: list[int]


def trainer_group(port: int, name: str) -> Any:
    """The gloo group of this process, which trains, and one engine; waits for the engine."""
    from sglang.srt.utils import init_custom_process_group

    return init_custom_process_group(
        backend="gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        world_size=2,
        rank=0,
        group_name=name,
    )


class EngineProcess(EnginePipe):
    """`sglang.Engine` behind a pipe.

    Parameters
    ----------
    model : checkpoint folder
    log : file that receives the output of all the engine's processes
    environment : additions to `ENVIRONMENT`
    options : arguments of `sglang.Engine`, over `OPTIONS`
    """

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        from m3_sglang.compat import needs_triton_on_cpu

        self.model = model
        arguments = {"model_path": str(model), **OPTIONS, **options}
        variables = ENVIRONMENT | (environment or {})
        if options.get("enable_metrics"):
            # prometheus_client decides on import that processes share their values
            folder = log.with_suffix(".metrics")
            folder.mkdir(exist_ok=True)
            variables["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        if needs_triton_on_cpu():
            variables["TRITON_INTERPRET"] = "1"
            arguments["disable_cuda_graph"] = True
        super().__init__(_serve, log, arguments, environment=variables, preload=PRELOAD, log=log)

    def generate(
        self, prompts: Sequence[Any], *, max_tokens: int | Sequence[int] = 8, **sampling: Any
    ) -> list[Completion]:
        """Generate for all prompts together, greedily unless told otherwise.

        Parameters
        ----------
        prompts : lists of token ids, or dicts of arguments of `Engine.generate` for one prompt;
            dicts of different keys are asked one after the other
        max_tokens : one number, or one per prompt
        """
        return self._call("generate", list(prompts), max_tokens, sampling)

    def prompt_logprobs(self, prompt: Any) -> list[float]:
        """Log probability of every prompt token after the first.

        Parameters
        ----------
        prompt : a list of token ids, or a dict of arguments of `Engine.generate`
        """
        return self._call("prompt_logprobs", prompt)

    def abort(self, prompt: list[int], *, after: int, beside: list[int]) -> list[Completion]:
        """Abort a request once it has generated `after` tokens, while another one goes on.

        Returns what the aborted request had by then, and the other one's whole answer of 32 tokens.
        """
        return self._call("abort", prompt, after, beside)

    def join(self, first: list[int], later: list[int], *, after: int) -> list[Completion]:
        """A request that arrives once another one has generated `after` tokens; both of 32."""
        return self._call("join", first, later, after)

    def next_logprobs(self, prompts: list[list[int]], token_ids: list[int]) -> list[list[float]]:
        """Log probability of each of `token_ids` as the token after each prompt."""
        return self._call("next_logprobs", prompts, token_ids)

    def metric(self, name: str) -> float:
        """Sum over its labels of a metric as SGLang's `/metrics` shows it; needs enable_metrics."""
        return self._call("metric", name)

    def update_from_disk(self, folder: Path) -> tuple[bool, str]:
        """SGLang's answer to `/update_weights_from_disk`."""
        return self._call("update_from_disk", str(folder))

    def update_from_tensors(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        bucket: int,
        cut: str = "",
        load_format: str | None = None,
    ) -> list[tuple[bool, str]]:
        """One update session with tensors of a folder; SGLang's answers, one per bucket.

        Parameters
        ----------
        names : in the order in which they are sent
        bucket : tensors per request
        cut : one of them, sent without its last row
        load_format : SGLang's word for how buckets are written
        """
        return self._call("update_from_tensors", str(folder), list(names), bucket, cut, load_format)

    def update_from_group(self, folder: Path, names: Sequence[str]) -> tuple[bool, str]:
        """The same over a gloo group in which the engine's parent is the trainer."""
        return self._call("update_from_group", str(folder), list(names))

    def detach_files(self) -> bool:
        """Whether SGLang has let go of HiCache's store; it refuses while pages are on their way."""
        return self._call("detach_files")

    def attach_files(self, backend: str, folder: Path) -> tuple[bool, str]:
        """SGLang's answer to `PUT /hicache/storage-backend`."""
        return self._call("attach_files", backend, str(folder))

    def load_adapter(self, name: str, folder: Path) -> tuple[bool, str]:
        """SGLang's answer to `/load_lora_adapter`."""
        return self._call("load_adapter", name, str(folder))

    def unload_adapter(self, name: str) -> tuple[bool, str]:
        """SGLang's answer to `/unload_lora_adapter`."""
        return self._call("unload_adapter", name)

    def flush(self) -> bool:
        """Empty the radix cache; False if SGLang refuses because a request still runs."""
        return self._call("flush")


def _serve(pipe: Connection, log: Path, arguments: dict[str, Any]) -> None:
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())

    def start() -> _Engine:
        from sglang import Engine

        fork_children()
        return _Engine(Engine(**arguments))

    engine = answer_requests(pipe, start)
    if engine is not None:
        engine.host.shutdown()


def checkpoint_tensors(folder: str | Path) -> dict[str, Any]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class _Engine:
    def __init__(self, host: Any) -> None:
        self.host = host

    def generate(self, prompts: list[Any], max_tokens: Any, sampling: dict) -> list[Completion]:
        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        params = [{"temperature": 0, "max_new_tokens": n, **sampling} for n in limits]
        if all(isinstance(prompt, list) for prompt in prompts):
            outputs = self.host.generate(input_ids=prompts, sampling_params=params)
        elif len(prompts) > 1 and all(prompt.keys() == prompts[0].keys() for prompt in prompts):
            together = {name: [prompt[name] for prompt in prompts] for name in prompts[0]}
            outputs = self.host.generate(**together, sampling_params=params)
        else:
            outputs = [
                self.host.generate(**prompt, sampling_params=p)
                for prompt, p in zip(prompts, params, strict=True)
            ]
        return [_completion(output) for output in outputs]

    def prompt_logprobs(self, prompt: Any) -> list[float]:
        asked = {"input_ids": prompt} if isinstance(prompt, list) else prompt
        output = self.host.generate(
            **asked,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        return _completion(output).input_logprobs[1:]

    def abort(self, prompt: list[int], after: int, beside: list[int]) -> list[Completion]:
        async def run() -> list[Completion]:
            params = {"temperature": 0, "ignore_eos": True}
            other = asyncio.ensure_future(
                self.host.async_generate(
                    input_ids=beside, sampling_params={**params, "max_new_tokens": 32}
                )
            )
            stream = await self.host.async_generate(
                input_ids=prompt,
                sampling_params={**params, "max_new_tokens": 1000},
                stream=True,
                rid="to-abort",
            )
            last: dict[str, Any] = {}
            async for output in stream:
                last = output
                if output["meta_info"]["completion_tokens"] >= after:
                    self.host.tokenizer_manager.abort_request(rid="to-abort")
            return [_completion(last), _completion(await other)]

        return self.host.loop.run_until_complete(run())

    def join(self, first: list[int], later: list[int], after: int) -> list[Completion]:
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 32}

        async def run() -> list[Completion]:
            stream = await self.host.async_generate(
                input_ids=first, sampling_params=params, stream=True
            )
            joined, last = None, {}
            async for last in stream:
                if joined is None and last["meta_info"]["completion_tokens"] >= after:
                    joined = asyncio.ensure_future(
                        self.host.async_generate(input_ids=later, sampling_params=params)
                    )
            assert joined is not None
            return [_completion(last), _completion(await joined)]

        return self.host.loop.run_until_complete(run())

    def next_logprobs(self, prompts: list[list[int]], token_ids: list[int]) -> list[list[float]]:
        outputs = self.host.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            token_ids_logprob=[token_ids] * len(prompts),
        )
        tables = [output["meta_info"]["output_token_ids_logprobs"][0] for output in outputs]
        found = [{token: logprob for logprob, token, *_ in table} for table in tables]
        return [[table[token] for token in token_ids] for table in found]

    def update_from_disk(self, folder: str) -> tuple[bool, str]:
        success, message, *_ = self.host.update_weights_from_disk(folder)
        return success, message

    def update_from_tensors(
        self, folder: str, names: list[str], bucket: int, cut: str, load_format: str | None
    ) -> list[tuple[bool, str]]:
        tensors = checkpoint_tensors(folder)
        if cut:
            tensors[cut] = tensors[cut][:-1].clone()
        self.host.begin_weight_update()
        answers = []
        for start in range(0, len(names), bucket):
            sent = [(name, tensors[name]) for name in names[start : start + bucket]]
            success, message = self.host.update_weights_from_tensor(sent, load_format=load_format)
            answers.append((success, message))
        self.host.end_weight_update()
        return answers

    def update_from_group(self, folder: str, names: list[str]) -> tuple[bool, str]:
        from concurrent.futures import ThreadPoolExecutor

        import torch
        from sglang.srt.utils.network import get_open_port

        port, group = get_open_port(), "trainer"
        tensors = checkpoint_tensors(folder)
        with ThreadPoolExecutor(1) as trainer:
            joined = trainer.submit(trainer_group, port, group)
            self.host.init_weights_update_group("127.0.0.1", port, 1, 2, group, backend="gloo")
            own: Any = joined.result(60)
            self.host.begin_weight_update()

            def send() -> None:
                for name in names:
                    torch.distributed.broadcast(tensors[name], src=0, group=own)

            sent = trainer.submit(send)
            success, message = self.host.update_weights_from_distributed(
                names,
                [str(tensors[name].dtype).removeprefix("torch.") for name in names],
                [list(tensors[name].shape) for name in names],
                group_name=group,
            )
            sent.result(60)
            self.host.end_weight_update()
        return success, message

    def detach_files(self) -> bool:
        reply = self._run(self.host.tokenizer_manager.detach_hicache_storage())
        return reply.success

    def attach_files(self, backend: str, folder: str) -> tuple[bool, str]:
        extra = json.dumps({"file_storage_path": folder})
        manager = self.host.tokenizer_manager
        reply = self._run(manager.attach_hicache_storage(backend, extra))
        return reply.success, reply.message

    def _run(self, coroutine: Any) -> Any:
        return self.host.loop.run_until_complete(coroutine)

    def metric(self, name: str) -> float:
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        samples = [sample for family in registry.collect() for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == name)

    def load_adapter(self, name: str, folder: str) -> tuple[bool, str]:
        answer = self.host.load_lora_adapter(lora_name=name, lora_path=folder)
        return answer.success, answer.error_message

    def unload_adapter(self, name: str) -> tuple[bool, str]:
        answer = self.host.unload_lora_adapter(lora_name=name)
        return answer.success, answer.error_message

    def flush(self) -> bool:
        return bool(self.host.flush_cache().success)


def _completion(output: dict[str, Any]) -> Completion:
    meta = output["meta_info"]
    return Completion(
        token_ids=list(output["output_ids"]),
        text=output["text"],
        num_cached_tokens=meta["cached_tokens"],
        num_prompt_tokens=meta["prompt_tokens"],
        finish_reason=(meta["finish_reason"] or {}).get("type"),
        input_logprobs=[entry[0] for entry in meta.get("input_token_logprobs") or []],
        num_verify_steps=meta.get("spec_verify_ct", 0),
        num_accepted=meta.get("spec_num_correct_drafts", 0),
        accepted_lengths=meta.get("spec_correct_drafts_histogram", []),
    )
