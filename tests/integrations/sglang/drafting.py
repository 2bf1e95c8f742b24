"""SGLang's draft workers of a GPU server, made on the meta device: NEXTN and EAGLE3.

Used by `building.py`, a process of its own for each server. Constructors of target and draft, their
pools, backends of attention and lists of graphs are those of SGLang's runner and of its workers, in
the order of its scheduler. A recorder stands for CUDA graphs: nothing is captured or run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from m3_kernels.testing.specialisations import recorded
from m3_plugin.checkpoint.names import mtp_modules, tensor_shape
from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import ExpertProbe
from m3_sglang.backend import M3AttentionBackend
from tests.integrations.counted import shortened
from tests.integrations.drafts import LARGE_HEAD
from tests.integrations.sglang.building import FREE, TRITON, in_a_child, ranks
from tests.integrations.sglang.rehearsal import chip, resolved

METHODS = ("NEXTN", "EAGLE3")
STEPS = (1, 2, 3, 4, 5)
RANKS = 8
LAYERS = 8
CHIP, META = "H100", "meta"
EXTENSIONS = (
    *("sgl_kernel", "sgl_kernel.flash_attn"),
    *("flash_mla", "flash_mla.flash_mla_interface"),
)
ITEM, CPU = torch.Tensor.item, torch.Tensor.cpu
WORKER = "sglang.srt.speculative.eagle_worker_v2"
# that SGLang asks a draft's backend about, imported once for all servers
BACKENDS = (
    "sglang.srt.layers.attention.dsa_backend",
    "sglang.srt.layers.attention.deepseek_v4_backend",
    "sglang.srt.layers.attention.flashattention_backend",
    "sglang.srt.layers.attention.flashmla_backend",
)


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
    """Configs of a short target, of a head for it, and of MTP modules with a file of holes."""
    short = shortened(released, LAYERS)
    modules = {**short["text_config"], "architectures": ["MiniMaxM3MTP"]}
    modules["model_type"] = "minimax_m3_mtp"
    for name, config in (("short", short), ("head", LARGE_HEAD), ("mtp", modules)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    config = M3Config.from_hf(short)
    names = mtp_modules(config, num_modules=1)
    write_holes(
        folder / "mtp" / "model.safetensors",
        {
            name if name.endswith("_bias") else f"{name}.weight": tensor_shape(config, name)
            for name in sorted(names)
        },
    )


def write_holes(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 tensors whose header alone takes space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written)
    os.truncate(file, 8 + len(written) + end)


def command(folder: Path, method: str, steps: int) -> list[str]:
    """What is typed for a server that drafts so many tokens."""
    draft = folder / ("mtp" if method == "NEXTN" else "head")
    return [
        *("--model-path", str(folder / "short"), "--tp", str(RANKS), "--skip-tokenizer-init"),
        *("--load-format", "dummy", "--speculative-algorithm", method),
        # a plan for each size that is captured
        *("--cuda-graph-max-bs-decode", "2"),
        *("--speculative-draft-model-path", str(draft), "--speculative-eagle-topk", "1"),
        *("--speculative-num-steps", str(steps)),
        *("--speculative-num-draft-tokens", str(steps + 1)),
    ]


class Kernels(ModuleType):
    """SGLang's extension, of which every name is there and nothing runs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def read(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers in place of those that a tensor would have."""
    return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")


def everywhere(owner: Any, name: str, value: Any) -> None:
    """Replace a function of SGLang's in all modules that have imported it."""
    there = getattr(owner, name)
    for module in [m for n, m in sys.modules.items() if n.startswith("sglang.")]:
        if module.__dict__.get(name) is there:
            mock.patch.object(module, name, value).start()


def on_meta() -> None:
    """What of SGLang asks a device for memory, streams, kernels or numbers; for this process."""
    from sglang.srt import platforms
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dual_gemm
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components import load_model_utils
    from sglang.srt.model_executor.runner_backend import utils as graphs
    from sglang.srt.model_loader import loader
    from sglang.srt.platforms.cuda import CudaSRTPlatform
    from sglang.srt.speculative import eagle_worker_v2
    from sglang.srt.utils import common

    from m3_plugin.attention import assembly
    from m3_sglang import session

    for owner, name, value in (
        (common, "get_available_gpu_memory", lambda *a, **kw: float(FREE)),
        (graphs, "resolve_decode_backend", RecordedGraphs),
        (parallel_state, "graph_capture", graph_capture),
    ):
        everywhere(owner, name, value)
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (session, "choose_kernels", lambda *a, **kw: TRITON),
        (assembly, "choose_kernels", lambda *a, **kw: TRITON),
        (assembly, "require_served", lambda *a, **kw: None),
        (assembly, "try_kernels", lambda *a, **kw: None),
        (memory_pool, "_is_cuda", True),
        (eagle_worker_v2, "_is_cuda", True),
        (eagle_worker_v2, "_is_cpu", False),
        (torch, "get_device_module", lambda *a, **kw: torch.cpu),
        (loader, "initialize_dummy_weights", lambda *a, **kw: None),
        # before and after each capture, for nothing
        (gc, "collect", lambda *a: 0),
        # lengths of a capture are read and summed up for backends that plan by them
        (torch.Tensor, "item", lambda tensor: 0 if tensor.is_meta else ITEM(tensor)),
        (torch.Tensor, "cpu", lambda tensor: read(tensor) if tensor.is_meta else CPU(tensor)),
        (model_runner, "dist_barrier_after_load", lambda *a, **kw: None),
        # a library for two products in one, which is not installed here
        (dual_gemm, "is_cuda", lambda: False),
        (type(platforms.current_platform), "capabilities", CudaSRTPlatform.capabilities),
        # no numbers to prove experts with, and of a device its name alone
        (ExpertProbe, "prove", lambda *a, **kw: None),
        (
            load_model_utils,
            "DeviceConfig",
            lambda device, gpu_id: SimpleNamespace(device=device, gpu_id=gpu_id),
        ),
    )
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
    algorithm: Any = SpeculativeAlgorithm.from_string(resolved_name(record))
    made: Any = algorithm.create_worker(record)(**arguments, target_worker=target)
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


def graphs_of(runner: Any) -> dict[str, Any] | None:
    """Which batch sizes a runner of SGLang's captures, and rows of each of their requests."""
    if runner is None:
        return None
    return {"sizes": runner.backend.sizes, "rows": runner.captured_req_width}


def report(record: Any) -> dict[str, Any]:
    """What became of one server's drafts."""
    target, draft = workers(record)
    wide, runner = target.model_runner, draft.draft_runner
    text, model = wide.model.language_model, runner.model
    backends = backends_of(draft)
    session: Any = wide.attn_backend.session
    sessions: list[Any] = [
        each.session for each in backends if isinstance(each, M3AttentionBackend)
    ]
    pool = runner.token_to_kv_pool
    return {
        "worker": type(draft).__name__,
        "draft": type(model).__name__,
        "backends": [type(each).__name__ for each in backends],
        "graphs": {
            "verify": graphs_of(wide.decode_cuda_graph_runner),
            "draft": graphs_of(draft.cuda_graph_runner),
            "extend": graphs_of(draft.cuda_graph_runner_for_draft_extend),
        },
        "decode_rows": session.workspace.capacity.decode_rows,
        "scratch_shared": all(
            each.workspace.scratch is session.workspace.scratch for each in sessions
        ),
        "plans_apart": len({id(each.workspace.plan_buffers) for each in (session, *sessions)})
        == 1 + len(sessions),
        "requests_shared": runner.req_to_token_pool is wide.req_to_token_pool,
        "pool": type(pool).__name__,
        "keys": list(pool.get_key_buffer(0).shape),
        "slots": wide.token_to_kv_pool.get_key_buffer(0).shape[0],
        "embedding_shared": same_memory(
            model.model.embed_tokens.weight, text.model.embed_tokens.weight
        ),
        "head_shared": same_memory(model.lm_head.weight, text.lm_head.weight),
    }


def backends_of(draft: Any) -> list[Any]:
    """Of the extend step, then of each further one."""
    steps = getattr(draft.draft_attn_backend, "attn_backends", [])
    return [draft.draft_extend_attn_backend, *steps]


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def draft(folder: Path, method: str, steps: int) -> dict[str, Any]:
    """One server's report, in a process of its own."""
    from sglang.srt.runtime_context import SpawnRanks, get_context, publish

    record = resolved(command(folder, method, steps))
    publish(record, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    get_context().override("rehearsal", device=META)
    on_meta()
    major, minor = torch.cuda.get_device_capability()
    with ranks(RANKS), recorded(10 * major + minor):
        return report(record)


def drafts(folder: Path, released: dict[str, Any]) -> dict[str, Any]:
    """Method and steps -> report, in a process whose modules are of a chip; see `BACKENDS`."""
    write_checkpoints(folder, released)
    found = {}
    # before there are extensions, as `building.BEFORE`
    importlib.import_module(WORKER)
    with chip(CHIP):
        for name in EXTENSIONS:
            sys.modules[name] = Kernels(name)
        for name in BACKENDS:
            importlib.import_module(name)
        for method in METHODS:
            for steps in STEPS:
                work = partial(draft, folder, method, steps)
                found[f"{method} {steps}"] = in_a_child(work)
    return found
