"""SGLang's draft workers of a GPU server, made on the meta device: NEXTN and EAGLE3.

Used by `building.py`, a process of its own for each server. Constructors of target and draft, their
pools, backends of attention and lists of graphs are those of SGLang's runner and of its workers, in
the order of its scheduler. A recorder stands for CUDA graphs: nothing is captured or run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from m3_plugin.attention.backends import KernelChoice
from tests.integrations.counted import shortened
from tests.integrations.drafts import LARGE_HEAD
from tests.integrations.sglang.building import FREE, buffers_of, ranks
from tests.integrations.sglang.rehearsal import resolved

METHODS = ("NEXTN", "EAGLE3")
STEPS = (1, 2, 3, 4, 5)
RANKS = 8
LAYERS = 8
TRITON = KernelChoice(family="triton", reason="rehearsed", refused=())
META = "meta"


class RecordedGraphs:
    """In the place of SGLang's CUDA graphs: keeps the shapes, and what is planned for each."""

    def __init__(self, runner: Any, **options: Any) -> None:
        self.runner = runner
        self.sizes: list[int] = []

    @contextlib.contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], **options: Any) -> None:
        self.sizes.append(shape_key.size)

    def cleanup(self) -> None:
        """Nothing is held."""


def write_checkpoints(folder: Path, released: dict[str, Any]) -> None:
    """Configs of a short target and of a head for it."""
    for name, config in (("short", shortened(released, LAYERS)), ("head", LARGE_HEAD)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))


def command(folder: Path, method: str, steps: int) -> list[str]:
    """What is typed for a server that drafts so many tokens."""
    draft = folder / ("short" if method == "NEXTN" else "head")
    return [
        *("--model-path", str(folder / "short"), "--tp", str(RANKS), "--skip-tokenizer-init"),
        *("--load-format", "dummy", "--speculative-algorithm", method),
        *("--speculative-draft-model-path", str(draft), "--speculative-eagle-topk", "1"),
        *("--speculative-num-steps", str(steps)),
        *("--speculative-num-draft-tokens", str(steps + 1)),
    ]


def on_meta() -> None:
    """What of SGLang asks a device for memory, streams or numbers; for this process."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.mem_cache import kv_cache_configurator, memory_pool
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner
    from sglang.srt.model_loader import loader
    from sglang.srt.speculative import (
        eagle_draft_cuda_graph_runner,
        eagle_draft_extend_cuda_graph_runner,
        eagle_worker_v2,
    )

    from m3_plugin.attention import assembly
    from m3_sglang import session

    free = (bootstrap, kv_cache_configurator, model_runner, decode_cuda_graph_runner)
    replaced: list[tuple[Any, str, Any]] = [
        *((module, "get_available_gpu_memory", lambda *a, **kw: float(FREE)) for module in free),
        (eagle_worker_v2, "get_available_gpu_memory", lambda *a, **kw: float(FREE)),
        (session, "choose_kernels", lambda *a, **kw: TRITON),
        (assembly, "choose_kernels", lambda *a, **kw: TRITON),
        (assembly, "require_served", lambda *a, **kw: None),
        (assembly, "try_kernels", lambda *a, **kw: None),
        (memory_pool, "_is_cuda", True),
        (torch, "get_device_module", lambda *a, **kw: torch.cpu),
        (loader, "initialize_dummy_weights", lambda *a, **kw: None),
    ]
    for module in (
        decode_cuda_graph_runner,
        eagle_draft_cuda_graph_runner,
        eagle_draft_extend_cuda_graph_runner,
    ):
        replaced.append((module, "resolve_decode_backend", RecordedGraphs))
    for owner, name, value in replaced:
        mock.patch.object(owner, name, value).start()


@contextlib.contextmanager
def graph_capture(stream: Any = None) -> Iterator[Any]:
    """SGLang's, without a stream."""
    yield SimpleNamespace(stream=None)


def workers(record: Any) -> tuple[Any, Any]:
    """Target and draft of one rank, from their constructors to their graphs."""
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    arguments = {"server_args": record, "gpu_id": 0, "nccl_port": 0}
    target = TpModelWorker(**arguments)
    algorithm = SpeculativeAlgorithm.from_string(resolved_name(record))
    made = algorithm.create_worker(record)(**arguments, target_worker=target)
    target.alloc_memory_pool(draft_parallel_layout=made.draft_parallel_layout)
    pool, allocator = target.get_memory_pool()
    made.alloc_memory_pool(
        memory_pool_config=target.model_runner.memory_pool_config,
        req_to_token_pool=pool,
        token_to_kv_pool_allocator=allocator,
    )
    target.init_attention_backends()
    made.init_attention_backends()
    target.init_cuda_graphs()
    # from here on SGLang asks for the kind of device alone, to choose who captures
    draft = made.draft_worker
    target.device = draft.device = "cuda"
    made.init_cuda_graphs()
    return target, draft


def resolved_name(record: Any) -> str:
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(record).speculative_algorithm
