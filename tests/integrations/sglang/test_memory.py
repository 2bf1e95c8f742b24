"""The workspace of MSA layers is counted in the memory that SGLang divides among its caches."""

from __future__ import annotations

import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.model.config import M3Config, local_heads
from tests.plugin.model.test_config import hub

pytestmark = pytest.mark.every_release

GIB = 2**30
ARGUMENTS: dict[str, Any] = {
    "chunked_prefill_size": 8192,
    "max_prefill_tokens": 16384,
    "speculative_num_draft_tokens": None,
    "max_running_requests": None,
}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels of a GPU, ranks, and SGLang's questions about this machine's memory answered."""
    from sglang.srt.mem_cache import kv_cache_configurator as host

    from m3_sglang import registration, session

    triton = KernelChoice(family="triton", reason="tested", refused=())
    monkeypatch.setattr(session, "choose_kernels", lambda *a, **kw: triton)
    monkeypatch.setattr(session, "attention_parallel_size", lambda: 8)
    monkeypatch.setattr(session, "read_config", lambda config: M3Config.from_hf(hub()))
    monkeypatch.setattr(registration, "is_ours", lambda config: config.architectures != ["Other"])
    monkeypatch.setattr(host, "get_available_gpu_memory", lambda *a, **kw: 40.0)
    monkeypatch.setattr(host, "mm_runtime_reservation_gb", lambda **kw: 0.0)
    contexts = {
        "get_parallel": SimpleNamespace(
            launch_world_size=1, world_size=1, world_group=SimpleNamespace(cpu_group=None)
        ),
        "get_schedule": SimpleNamespace(mem_fraction_static=0.9, prefill_max_requests=None),
        "get_exec": SimpleNamespace(
            graph=SimpleNamespace(
                cuda_graph_config=SimpleNamespace(
                    prefill=SimpleNamespace(backend="disabled", full_prefill_max_req=None)
                )
            )
        ),
        "get_disagg": SimpleNamespace(disaggregation_mode="null"),
        "get_mm": SimpleNamespace(mm_feature_transport=None),
    }
    for name, context in contexts.items():
        if hasattr(host, name):
            monkeypatch.setattr(host, name, lambda context=context: context)
    return host


def sizing(*, architecture: str = "MiniMaxM3SparseForCausalLM", **arguments: Any) -> Any:
    return SimpleNamespace(
        device="cpu",
        gpu_id=0,
        mambaish_config=None,
        post_capture_kv_active=False,
        model_dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16,
        model_config=SimpleNamespace(
            context_len=2**20,
            is_multimodal=False,
            hf_config=SimpleNamespace(architectures=[architecture]),
        ),
        server_args=SimpleNamespace(**ARGUMENTS | arguments),
    )


def budget(host: Any, given: Any) -> int:
    from m3_sglang.registration import keep_room

    # a process whose plugins are loaded has our hook around it already
    original = inspect.unwrap(host.KVCacheConfigurator._profile_available_bytes)
    return keep_room(original, given, 80)


def test_the_hook_is_on_what_sglang_asks() -> None:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    from m3_sglang.registration import CACHE_BUDGET

    owner, _, name = CACHE_BUDGET.rpartition(".")
    assert pkgutil.resolve_name(owner) is KVCacheConfigurator
    # once, before the pools of a target are sized; those of a draft follow it
    asking = inspect.getsource(KVCacheConfigurator._resolve_memory_pool_config)
    assert asking.count(f"self.{name}(pre_model_load_memory)") == 1
    most = inspect.getsource(KVCacheConfigurator.resolve_max_num_reqs)
    assert "max(min(estimated, 4096), 2048)" in most


@pytest.mark.parametrize("requests", [None, 48])
@pytest.mark.parametrize("chain", [None, 4])
def test_caches_leave_room_for_the_workspace(
    on_a_gpu: Any, requests: int | None, chain: int | None
) -> None:
    from m3_sglang.session import step_capacity

    given = sizing(max_running_requests=requests, speculative_num_draft_tokens=chain)
    kept = 32 * GIB - budget(on_a_gpu, given)
    # what the backend allocates later, for the pool that SGLang then has
    table = torch.empty(1, 2**20 + 8, dtype=torch.int32, device="meta")
    pool = SimpleNamespace(size=requests or 4096, req_to_token=table)
    capacity = step_capacity(SimpleNamespace(server_args=given.server_args, req_to_token_pool=pool))
    config = M3Config.from_hf(hub())
    assert config.msa is not None
    bf16 = torch.bfloat16
    shape = LayerShape(
        local_heads(config.num_attention_heads, 8),
        local_heads(config.num_key_value_heads, 8),
        config.head_dim,
        config.rotary_dim,
        bf16,
        bf16,
        bf16,
    )
    workspace = allocate_workspace(config.msa, shape, capacity, device=torch.device("meta"))
    # the passes of a prompt divide their share of scores by the context, with a remainder
    assert abs(kept - workspace.num_bytes) < GIB // 128


def test_other_models_and_kernels_without_a_workspace_keep_their_caches(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m3_sglang import session

    assert budget(on_a_gpu, sizing(architecture="Other")) == 32 * GIB
    native = KernelChoice(family="native", reason="tested", refused=())
    monkeypatch.setattr(session, "choose_kernels", lambda *a, **kw: native)
    assert budget(on_a_gpu, sizing()) == 32 * GIB
