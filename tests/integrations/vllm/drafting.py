"""vLLM's draft workers of a GPU server, made on the meta device: MTP and EAGLE3.

Used by `building.py`, in its process. Constructors, loading of the draft model, groups of attention
and the lists of graphs are those of vLLM's runner V2, which GPUs use. Nothing is captured or run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.integrations.counted import shortened
from tests.integrations.drafts import LARGE_HEAD
from tests.integrations.vllm.building import build, layouts_of, rank, resolved, specs_of

METHODS = ("mtp", "eagle3")
STEPS = (1, 2, 3, 4, 5)
LAYERS = 8
RANKS = 8


def command(method: str, steps: int, head: Path) -> str:
    """What is typed for a server that drafts so many tokens."""
    given: dict[str, Any] = {"method": method, "num_speculative_tokens": steps}
    if method == "eagle3":
        given["model"] = str(head)
    typed = json.dumps(given, separators=(",", ":"))
    return f"--tensor-parallel-size {RANKS} --speculative-config {typed}"


def as_this_release(function: Callable[..., Any], **given: Any) -> Any:
    """Call with those arguments that this release of vLLM takes."""
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in given.items() if name in taken})


def graph_sizes(manager: Any) -> dict[str, list[list[int | None]]]:
    """Mode -> tokens and requests of each graph that would be captured."""
    return {
        mode.name: [[graph.num_tokens, graph.num_reqs] for graph in graphs]
        for mode, graphs in manager._capture_descs.items()
    }


def draft_worker(config: Any, target: Any, steps: int) -> tuple[Any, Any]:
    """What runner V2 does about drafts, from its constructor to its list of graphs.

    Returns the worker and the configuration of the cache.
    """
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.worker.gpu.attn_utils import init_attn_backend
    from vllm.v1.worker.gpu.spec_decode import init_speculator
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import (
        set_eagle3_aux_hidden_state_layers,
    )

    device = torch.device("meta")
    worker = as_this_release(init_speculator, vllm_config=config, device=device, req_states=None)
    if config.speculative_config.method == "eagle3":
        set_eagle3_aux_hidden_state_layers(target, config.speculative_config)
    worker.load_model(target)
    specs = specs_of(config)
    layouts = [layouts_of(config, specs)]
    layout = resolve_kv_cache_layout(config, layouts, list(specs.values()))
    config.cache_config.kv_cache_layout = layout.name
    (cache,) = get_kv_cache_configs(config, [specs], [2**36])
    groups, support, _ = init_attn_backend(
        cache, config, device, draft_layer_names=worker.draft_attn_layer_names
    )
    worker.set_attn(None, cache, None, None, groups)
    mode = as_this_release(
        config.compilation_config.resolve_cudagraph_mode_and_sizes,
        min_cg_support=support.min_cg_support,
        min_cg_attn_backend=support.min_cg_attn_backend,
        uniform_decode_query_len=steps + 1,
        use_v2_model_runner=True,
        tensor_parallel_size=RANKS,
        kv_cache_config=cache,
        max_num_reqs=worker.max_num_reqs,
        is_profiling=False,
        piecewise_capture_available=True,
    )
    worker.init_cudagraph_manager(mode)
    return worker, cache


def report(config: Any, target: Any, steps: int) -> dict[str, Any]:
    """What became of one server's drafts."""
    worker, cache = draft_worker(config, target, steps)
    text, draft = target.language_model, worker.model
    groups = [group for of_cache in worker.attn_groups for group in of_cache]
    session = getattr(draft.model, "session", None)
    return {
        "runner_v2": config.use_v2_model_runner,
        "worker": type(worker).__name__,
        "draft": type(draft).__name__,
        "steps": worker.num_speculative_steps,
        "layers": sorted(worker.draft_attn_layer_names),
        "cache_groups": len(cache.kv_cache_groups),
        "backends": sorted(group.backend.get_name() for group in groups),
        # vLLM 0.31 rebuilds the metadata of every draft
        "in_place": getattr(worker, "supports_decode_metadata_update", None),
        "decode_rows": text.model.session.workspace.capacity.decode_rows,
        "scratch_shared": session is None
        or session.workspace.scratch is text.model.session.workspace.scratch,
        "embedding_shared": draft.model.embed_tokens is text.model.embed_tokens,
        "head_shared": draft.lm_head is text.lm_head,
        "pictures": worker.supports_mm_inputs,
        "first_pass": graph_sizes(worker.prefill_cudagraph_manager),
        "drafts": graph_sizes(worker.decode_cudagraph_manager),
    }


def drafts(folder: str, gpu: Any) -> dict[str, Any]:
    """Method and steps -> report; `gpu` is the platform that `building.prepare` made."""
    from vllm.config import vllm as settings

    short = Path(folder) / "short"
    head = Path(folder) / "head"
    for place, config in ((short, shortened(_read(folder), LAYERS)), (head, LARGE_HEAD)):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        # without a driver vLLM takes Triton for missing, and runner V1
        stack.enter_context(mock.patch.object(settings, "HAS_TRITON", True))
        stack.enter_context(
            mock.patch.object(gpu, "graph_pool_handle", return_value="pool", create=True)
        )
        for name in ("empty_cache", "max_memory_allocated", "reset_peak_memory_stats"):
            stack.enter_context(mock.patch.object(torch.accelerator, name, return_value=0))
        for method in METHODS:
            for steps in STEPS:
                config = resolved(str(short), command(method, steps, head))
                config.cache_config.block_size = 128
                config.device_config.device = torch.device("meta")
                with rank(config, place=0, tensor=RANKS, stages=1):
                    name = f"{method} {steps}"
                    found[name] = report(config, build(config), steps)
    return found


def _read(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())
