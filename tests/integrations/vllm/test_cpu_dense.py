"""Our backend for dense layers on a CPU, beside vLLM's own, on vLLM's layers and metadata."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from m3_vllm.backend import dense_backend
from m3_vllm.cpu_dense import M3DenseBackend, M3DraftDenseBackend
from m3_vllm.speculation import take_draft_layers

HEADS, KV_HEADS, DIM = 4, 2, 32


def config(dtype: torch.dtype = torch.float32, **attention: Any) -> VllmConfig:
    made = VllmConfig(attention_config=AttentionConfig(**attention))
    made.model_config = SimpleNamespace(  # type: ignore[assignment]
        dtype=dtype,
        is_mm_prefix_lm=False,
        rswa_window=None,
        get_num_attention_heads=lambda parallel: HEADS,
    )
    made.cache_config.block_size = 128
    return made


def attention_layer(made: VllmConfig, backend: Any, *, name: str = "layer", **options: Any) -> Any:
    with set_current_vllm_config(made):
        return Attention(
            HEADS,
            DIM,
            DIM**-0.5,
            num_kv_heads=KV_HEADS,
            cache_config=made.cache_config,
            attn_backend=backend,
            prefix=name,
            **options,
        )


def step() -> CommonAttentionMetadata:
    """A chunk of 70 rows behind 130 cached keys, one decoding request, one of 3 rows."""
    starts = torch.tensor([0, 70, 71, 74], dtype=torch.int32)
    lengths = torch.tensor([200, 300, 129], dtype=torch.int32)
    table = torch.tensor([[5, 2, 0], [7, 1, 4], [3, 8, 0]], dtype=torch.int32)
    slots = [
        int(table[request, position // 128]) * 128 + position % 128
        for request, rows in enumerate((70, 1, 3))
        for position in range(int(lengths[request]) - rows, int(lengths[request]))
    ]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=3,
        num_actual_tokens=74,
        max_query_len=70,
        max_seq_len=300,
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
        causal=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_vllms_kernel(dtype: torch.dtype) -> None:
    """Earlier tokens are stored first, a page at a time, as a prefix is; then the step."""
    torch.manual_seed(0)
    results = []
    everything = [torch.randn(9 * 128, KV_HEADS, DIM, dtype=dtype) for _ in range(2)]
    q = torch.randn(80, HEADS, DIM, dtype=dtype)
    for backend in (CPUAttentionBackend, M3DenseBackend):
        made = config(dtype)
        layer = attention_layer(made, backend)
        spec = layer.get_kv_cache_spec(made)
        with set_current_vllm_config(made):
            builder = layer.attn_backend.get_builder_cls()(
                spec, ["layer"], made, torch.device("cpu")
            )
        cache = torch.full((9, KV_HEADS, 128, 2 * DIM), torch.nan, dtype=dtype)
        for page in torch.arange(9 * 128).split(128):
            layer.impl.do_kv_cache_update(layer, *(x[page] for x in everything), cache, page)
        common = step()
        k, v = (torch.full((74, KV_HEADS, DIM), 9.0, dtype=dtype) for _ in range(2))
        layer.impl.do_kv_cache_update(layer, k, v, cache, common.slot_mapping)
        out = torch.zeros(80, HEADS, DIM, dtype=dtype)
        layer.impl.forward(layer, q, k, v, cache, builder.build(0, common), out)
        results.append(out[:74].float())
    torch.testing.assert_close(*results, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert layer.impl.dense.rows == 74


@pytest.mark.parametrize(
    ("attention", "environment"),
    [({"backend": "CPU_ATTN"}, {}), ({}, {"M3_PLUGIN_DENSE": "host"})],
    ids=["named", "variable"],
)
def test_the_hosts_kernel_is_kept_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, attention: Any, environment: dict[str, str]
) -> None:
    with set_current_vllm_config(made := config()):
        assert dense_backend(made, head_dim=DIM) is M3DenseBackend
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with set_current_vllm_config(made := config(**attention)):
        assert dense_backend(made, head_dim=DIM) is CPUAttentionBackend


@pytest.fixture
def _vllms_choice() -> Iterator[None]:
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
    yield
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()


@pytest.mark.usefixtures("_vllms_choice")
def test_draft_layers_that_ask_vllm_get_ours_beside_m3_alone() -> None:
    made = config()
    take_draft_layers(made)
    attention_layer(made, M3DenseBackend, name="target")
    draft = attention_layer(made, None, name="draft")
    assert draft.attn_backend is M3DraftDenseBackend
    assert draft.impl.dense is not None
    windowed = attention_layer(made, None, name="windowed", per_layer_sliding_window=64)
    assert windowed.impl.dense is None
    # a model that this process builds later
    stranger = attention_layer(config(), None)
    assert stranger.impl.dense is None


@pytest.mark.usefixtures("_vllms_choice")
def test_drafts_keep_the_hosts_kernel_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_PLUGIN_DENSE", "host")
    take_draft_layers(made := config())
    assert attention_layer(made, None).attn_backend is CPUAttentionBackend
