"""Build the released model as a rank of a GPU server would, on the meta device, and its caches.

    python -m tests.integrations.sglang.building FOLDER_OF_A_CONFIG_JSON REPORT

A process of its own, and one more for each server: SGLang's state is its process's. The platform is
that of a chip (`rehearsal.chip`), the groups of ranks are real with a backend that moves nothing.
No weight is allocated and nothing is computed. Writes JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from m3_plugin.attention.backends import KernelChoice
from tests.integrations.sglang.rehearsal import chip, resolved

# chip, ranks, what else is typed
SERVERS = (
    ("H100", 1, ""),
    ("H100", 2, ""),
    ("H100", 4, ""),
    ("H100", 8, ""),
    ("H100", 8, "--kv-cache-dtype fp8_e4m3"),
    ("B200", 8, "--kv-cache-dtype fp8_e4m3"),
    ("B200", 4, ""),
)
# GiB of a rank that are free before SGLang divides them
FREE = 400
BEFORE = (
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.mem_cache.kv_cache_configurator",
    "m3_sglang.models.minimax_m3",
)
TRITON = KernelChoice(family="triton", reason="rehearsed", refused=())


@contextmanager
def ranks(count: int) -> Iterator[None]:
    """SGLang's groups as on the first of that many ranks."""
    from sglang.srt.distributed import parallel_state as host
    from sglang.srt.distributed.device_communicators import pynccl
    from sglang.srt.distributed.device_communicators.shm_broadcast import MessageQueue
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make_group = torch.distributed.new_group

    def without_moving(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("pg_options", None)
        return make_group(*args, backend="fake", **kwargs)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    with (
        mock.patch.object(torch.distributed, "new_group", without_moving),
        mock.patch.object(host, "_group_coordinator_device", return_value=torch.device("cpu")),
        mock.patch.object(pynccl, "PyNcclCommunicator"),
        mock.patch.object(MessageQueue, "create_from_process_group"),
    ):
        host.set_custom_all_reduce(False)
        host.init_distributed_environment(count, 0, "env://", 0, "fake")
        host.initialize_model_parallel(backend="fake")
        yield


def build(config: Any) -> Any:
    """The model of this rank."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        return _initialize_model(config, LoadConfig(), None)


def caches(record: Any, config: Any, model: Any) -> Any:
    """SGLang's configurator of this rank's pools, as its runner makes it."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.mem_cache import kv_cache_configurator as host
    from sglang.srt.model_executor.model_runner import SpecAuxHiddenStateConfig
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    asked = resolving_view(record).kv_cache_dtype
    dtype = torch.float8_e4m3fn if asked == "fp8_e4m3" else torch.bfloat16
    group = SimpleNamespace(world_size=1, rank_in_group=0, is_last_rank=True, is_first_rank=True)
    layers: Any = SimpleNamespace(
        start_layer=0,
        end_layer=config.num_hidden_layers,
        num_effective_layers=config.num_hidden_layers,
        is_hybrid_swa_mtp_draft=False,
        swa_attention_layer_ids=None,
        full_attention_layer_ids=None,
    )
    none: Any = SpeculativeAlgorithm.from_string(None)
    return host.KVCacheConfigurator(
        device="meta",
        gpu_id=0,
        attn_dp_size=1,
        pp_size=1,
        pp_group=group,
        model=model,
        model_config=config,
        server_args=record,
        kv_cache_dtype=dtype,
        model_dtype=torch.bfloat16,
        page_size=128,
        sliding_window_size=None,
        spec_algorithm=none,
        is_draft_worker=False,
        post_capture_kv_active=False,
        spec_aux_config=SpecAuxHiddenStateConfig(),
        is_hybrid_swa=False,
        is_hybrid_swa_compress=False,
        use_mla_backend=False,
        layer_info=layers,
        forward_stream=None,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        memory_pool_config=None,
    )


def server(folder: str, tensor: int, typed: str) -> dict[str, Any]:
    """A rank of a server: its weights, its pools, and what its session allocates beside them."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache import kv_cache_configurator as host
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.runtime_context import SpawnRanks, get_schedule, publish

    from m3_plugin.attention import assembly
    from m3_sglang import session as sessions

    arguments = ["--model-path", folder, "--tp", str(tensor), "--skip-tokenizer-init"]
    record = resolved([*arguments, *typed.split()])
    publish(record, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    for module, name, answer in (
        (sessions, "choose_kernels", TRITON),
        (assembly, "choose_kernels", TRITON),
        (assembly, "require_served", None),
        (assembly, "try_kernels", None),
        (host, "get_available_gpu_memory", float(FREE)),
    ):
        mock.patch.object(module, name, return_value=answer).start()
    mock.patch.object(memory_pool, "_is_cuda", new=True).start()
    # pools ask for streams of their device, and use them for copies alone
    mock.patch.object(torch, "get_device_module", return_value=torch.cpu).start()
    with ranks(tensor):
        config = ModelConfig.from_server_args(record)
        model = build(config)
        sizing = caches(record, config, model)
        found = sizing.configure(pre_model_load_memory=FREE)
        pool = found.token_to_kv_pool
        runner = SimpleNamespace(
            dtype=torch.bfloat16,
            kv_cache_dtype=sizing.kv_cache_dtype,
            device="meta",
            server_args=record,
            req_to_token_pool=found.req_to_token_pool,
            token_to_kv_pool=pool,
        )
        session = sessions.worker_session(model.language_model.m3_config, runner)
        assert session is not None
        assert session.workspace is not None
        return {
            "weights": sum(parameter.nbytes for parameter in model.parameters()),
            "layers": len(model.language_model.model.layers),
            "pool": type(pool).__name__,
            "tokens": found.max_total_num_tokens,
            "requests": found.max_running_requests,
            "pool_bytes": sum(each.nbytes for each in buffers_of(pool)),
            "budget": int(FREE * get_schedule().mem_fraction_static * 2**30),
            "shapes": [list(pool.get_key_buffer(3).shape), list(pool.get_index_k_buffer(3).shape)],
            "kept": sessions.workspace_of_pool(sizing),
            "workspace": session.workspace.num_bytes,
            "dtypes": [str(pool.get_key_buffer(3).dtype), str(pool.get_index_k_buffer(3).dtype)],
        }


def buffers_of(pool: Any) -> list[torch.Tensor]:
    """K, V and index keys of every layer."""
    layers = sorted({*pool.sparse_layer_id_mapping, *pool._dense_layer_ids})
    return [
        *(pool.get_key_buffer(layer) for layer in layers),
        *(pool.get_value_buffer(layer) for layer in layers),
        *(pool.get_index_k_buffer(layer) for layer in pool.sparse_layer_id_mapping),
    ]


def in_a_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own, or {"error": ...}."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = work()
        except BaseException as error:
            found = {
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc()[-3000:],
            }
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else {"error": "the process ended"}


def main(folder: str, report: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()

    from tests.integrations.sglang.drafting import drafts

    # before the platform is a chip's: they decide on import which extensions to load
    for name in BEFORE:
        importlib.import_module(name)
    # each child's collector leaves alone what was imported
    gc.freeze()
    found: dict[str, Any] = {}
    for name, tensor, typed in SERVERS:
        with chip(name):
            made = in_a_child(lambda tensor=tensor, typed=typed: server(folder, tensor, typed))
        found[f"{name}: tp {tensor} {typed}".strip()] = made
    released = json.loads(Path(folder, "config.json").read_text())
    made = in_a_child(lambda: drafts(Path(folder), released))
    Path(report).write_text(json.dumps({"servers": found, "drafts": made}))


if __name__ == "__main__":
    main(*sys.argv[1:])
