"""What only a server on GPUs does, on vLLM's own classes with the platform's answers replaced."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import clear_layer_kv_caches

from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.attention.backends import choose_kernels
from m3_plugin.attention.session import MSASession
from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_vllm import backend as backend_module
from m3_vllm.backend import M3IndexBackend, M3SparseBackend, dense_backend
from m3_vllm.caches import M3SparseCacheLayer
from m3_vllm.session import step_capacity


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make vLLM's platform answer as a GPU of this capability does."""

    def be(major: int, minor: int) -> None:
        capability = DeviceCapability(major, minor)
        monkeypatch.setattr(type(current_platform), "device_type", "cuda")
        monkeypatch.setattr(
            type(current_platform), "get_device_capability", lambda *a, **k: capability
        )

    return be


class FlashInfer(CPUAttentionBackend):
    """What FlashInfer's backend says on each chip; the library itself is not installed here."""

    sizes = (16, 32, 64)

    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        capability = current_platform.get_device_capability()
        assert capability is not None
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC) if capability.major == 10 else None

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
        return list(FlashInfer.sizes)


class Declaring(FlashInfer):
    """A dense backend that takes any layout, as FlashAttention's."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dense", [FlashInfer, Declaring])
def test_pipeline_stages_agree_on_the_layout(
    chip: Any, capability: tuple[int, int], dense: Any
) -> None:
    """Only the first stage holds dense layers."""
    config = VllmConfig()
    chip(*capability)
    stages = [
        [layout.name for layout in get_supported_kv_cache_layouts(backends)]
        for backends in (
            [dense, M3SparseBackend, M3IndexBackend],
            [M3SparseBackend, M3IndexBackend],
        )
    ]
    resolve_kv_cache_layout(config, stages)


def sparse_layer(config: VllmConfig | None = None, **cache: Any) -> M3SparseCacheLayer:
    """An MSA layer of the released model."""
    config = config or VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # type: ignore[assignment]
    for name, value in cache.items():
        setattr(config.cache_config, name, value)
    msa = M3Config.from_hf(released_config()).msa
    assert msa is not None
    session = MSASession(msa, kernels=choose_kernels("cpu"), scale=1.0)
    with set_current_vllm_config(config):
        return M3SparseCacheLayer(session=session, num_kv_heads=4, head_dim=128, prefix="layer")


@pytest.mark.parametrize("index_keys", ["auto", "int8"])
def test_a_cache_that_vllm_takes_away_is_freed(
    monkeypatch: pytest.MonkeyPatch, index_keys: str
) -> None:
    """The one it measures graphs with would stay beside the real one otherwise: up to 17 GiB."""
    monkeypatch.setenv("M3_PLUGIN_INDEX_KEYS", index_keys)
    layer = sparse_layer()
    index_dtype, width = layer.index_cache.dtype, layer.index_cache.width
    one = torch.zeros(2**20, dtype=torch.uint8)
    held = weakref.ref(one.untyped_storage())
    main = 3 * 4 * 128 * 256 * 2
    layer.bind_kv_cache(one[:main].view(torch.bfloat16).view(3, 4, 128, 256))
    index = one[main : main + 3 * 128 * width * index_dtype.itemsize].view(index_dtype)
    layer.index_cache.bind_kv_cache(index.view(3, 1, 128, width))
    assert layer.paged_caches().k_pages.shape[0] == 3
    clear_layer_kv_caches([layer, layer.index_cache])
    del one, index
    gc.collect()
    assert held() is None


def test_a_cache_at_the_address_of_the_last_is_not_taken_for_it() -> None:
    """Descriptors of the pages hold their number."""
    layer = sparse_layer()
    main, index = torch.zeros(5, 4, 128, 256).bfloat16(), torch.zeros(5, 1, 128, 128).bfloat16()
    for pages in (5, 3):
        layer.bind_kv_cache(main[:pages])
        layer.index_cache.bind_kv_cache(index[:pages])
        caches = layer.paged_caches()
        assert caches.k_pages.shape[0] == caches.index_k_pages.shape[0] == pages


def test_scales_of_the_cache_outlive_a_sleep_and_a_graph() -> None:
    """vLLM keeps the named buffers of a sleeping model; captured graphs keep addresses."""
    layer = sparse_layer(cache_dtype="fp8")
    layer.set_scales(CacheScales(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5])))
    kept = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    assert layer.scales.k is not None
    assert layer.scales.v is not None
    assert set(kept.values()) == {layer.scales.k.data_ptr(), layer.scales.v.data_ptr()}
    assert not layer.state_dict()
    layer.set_scales(CacheScales(torch.full((4,), 7.0), torch.tensor([8.0])))
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == kept
    assert layer.scales.k.tolist() == [7.0] * 4
    assert layer.scales.v.tolist() == [8.0]


def dense_config(**attention: Any) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        attention_config=SimpleNamespace(**{"backend": None, "backend_per_kind": {}, **attention}),
    )


def test_dense_layers_get_pages_of_128_where_flashinfer_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A B200 without FlashInfer's own kernels for it, which may need a download."""
    monkeypatch.setattr(backend_module, "device_type", lambda: "cuda")
    monkeypatch.setattr(backend_module, "get_attn_backend", lambda **kw: FlashInfer)
    monkeypatch.setattr(
        AttentionBackendEnum,
        "get_class",
        lambda self: {"FLASH_ATTN": FlashInfer}.get(self.name, CPUAttentionBackend),
    )
    assert dense_backend(dense_config(), head_dim=128) is CPUAttentionBackend
    named = dense_config(backend=AttentionBackendEnum.FLASHINFER)
    with pytest.raises(ValueError, match=r"FLASHINFER has no pages .*--attention-backend, such as"):
        dense_backend(named, head_dim=128)
    monkeypatch.setattr(FlashInfer, "sizes", (16, 32, 64, 128))
    assert dense_backend(named, head_dim=128) is FlashInfer


@pytest.mark.parametrize(("drafted", "rows"), [(None, 1), (1, 2), (3, 4), (5, 6), (9, DECODE_ROWS)])
def test_scratch_is_made_for_the_rows_a_request_decodes(drafted: int | None, rows: int) -> None:
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=1024, max_num_batched_tokens=8192),
        speculative_config=drafted and SimpleNamespace(num_speculative_tokens=drafted),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=512),
        model_config=SimpleNamespace(max_model_len=1048576),
    )
    assert step_capacity(config).decode_rows == rows


class Discarding:
    """In the place of vLLM's allocator: level 1 brings back what there was, level 2 anything."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def suspend(self, level: int) -> None:
        if level == 2:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.data.fill_(99.0)

    def resume(self, tags: list[str] | None) -> None:
        """Memory is there again."""


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_that_slept_has_its_scales(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """By vLLM's own `sleep` and `wake_up`; weights of level 2 come with the next update."""
    for name, answer in (("synchronize", None), ("get_memory_info", (1, 2))):
        monkeypatch.setattr(torch.accelerator, name, lambda *a, answer=answer: answer)
    layer = sparse_layer(cache_dtype="fp8")
    scales = CacheScales(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5]))
    layer.set_scales(scales)
    norm = torch.nn.LayerNorm(4)
    model = torch.nn.ModuleDict({"attn": layer, "norm": norm})
    worker: Any = object.__new__(Worker)
    worker.model_runner = SimpleNamespace(model=model)
    worker.model_config = SimpleNamespace(
        sleep_preserve_parameter_names=[], enable_nccl_comm_suspend=False
    )
    worker.vllm_config = SimpleNamespace(model_config=worker.model_config)
    worker._sleep_mode_backend = Discarding(model)
    worker._sleep_saved_buffers = worker._sleep_saved_draft_buffers = {}
    worker._sleep_saved_parameters = {}
    worker.get_draft_model = lambda: None
    worker.synchronize_device = lambda: None
    worker.sleep(level)
    if level == 2:
        assert layer.scales.k is not None
        assert layer.scales.k.tolist() == [99.0] * 4
    worker.wake_up()
    assert layer.scales.k is not None
    assert layer.scales.v is not None
    assert layer.scales.k.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert layer.scales.v.tolist() == [0.5] * len(layer.scales.v)
    assert (norm.weight.tolist() == [99.0] * 4) is (level == 2)


def test_vllm_refuses_to_sleep_on_a_cpu(random_checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        ModelConfig(model=str(random_checkpoint("engine")), enable_sleep_mode=True)
