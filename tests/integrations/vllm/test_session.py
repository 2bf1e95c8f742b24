"""What a vLLM worker tells its session, on vLLM's own configuration objects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.compilation.backends import split_graph
from vllm.config import (
    AttentionConfig,
    CompilationConfig,
    CompilationMode,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from m3_kernels.norm_rope_store import HeadNorms
from m3_plugin.attention.backends import choose_kernels
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.session import MSASession
from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_plugin.model.rope import RowAngles
from m3_vllm.backend import M3IndexMetadata, M3Metadata
from m3_vllm.caches import M3SparseCacheLayer  # its module registers the op
from m3_vllm.session import (
    ATTENTION_OP,
    keep_attention_out_of_piecewise_graphs,
    worker_session,
)


class Layer(torch.nn.Module):
    """A projection, our op, another projection: three pieces if vLLM splits at the op."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        torch.ops.vllm.m3_msa_attention(q * 2, q, q, q, q, q, q, q, q, 1e-6, q, out, "layer")
        return out + 1


def pieces(config: VllmConfig) -> list[bool]:
    """Whether each piece of the split layer is left out of piecewise graphs."""
    traced = torch.fx.symbolic_trace(Layer())
    splitting = config.compilation_config.splitting_ops
    assert splitting is not None
    _, items = split_graph(traced, splitting)
    return [item.is_splitting_graph for item in items]


def compiled() -> VllmConfig:
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
    config.compilation_config.splitting_ops = None
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.set_splitting_ops_for_v1("naive")
    return config


def test_piecewise_graphs_never_hold_our_attention() -> None:
    config = compiled()
    assert pieces(config) == [False]
    keep_attention_out_of_piecewise_graphs(config)
    assert pieces(config) == [False, True, False]
    keep_attention_out_of_piecewise_graphs(config)
    splitting = config.compilation_config.splitting_ops
    assert splitting is not None
    assert splitting.count(ATTENTION_OP) == 1
    assert ATTENTION_OP not in CompilationConfig._attention_ops


def test_a_model_that_is_not_split_stays_whole() -> None:
    config = compiled()
    config.compilation_config.splitting_ops = []
    keep_attention_out_of_piecewise_graphs(config)
    assert config.compilation_config.splitting_ops == []


def test_two_micro_batches_are_refused() -> None:
    config = VllmConfig()
    config.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match="without --enable-dbo"):
        worker_session(M3Config.from_hf(released_config()), config)


@pytest.mark.parametrize("asked", ["", "nvfp4"])
def test_a_workers_session_rounds_what_it_stores_if_asked(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    from m3_vllm import session as sessions

    monkeypatch.setenv("M3_PLUGIN_CACHE_VALUES", asked)
    monkeypatch.setattr(sessions, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(sessions, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(sessions, "engine_of_first_worker", lambda: None)
    config = VllmConfig()
    config.model_config = SimpleNamespace(  # type: ignore[assignment]
        dtype=torch.bfloat16, max_model_len=1024
    )
    made = worker_session(M3Config.from_hf(released_config()), config)
    assert made is not None
    assert made.nvfp4 is (asked == "nvfp4")


def index_layer(config: VllmConfig, **attention: str) -> M3SparseCacheLayer:
    """An MSA layer of the released model under these options."""
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # type: ignore[assignment]
    config.cache_config.block_size = 128
    config.attention_config = AttentionConfig(**attention)  # type: ignore[arg-type]
    msa = M3Config.from_hf(released_config()).msa
    assert msa is not None
    session = MSASession(msa, kernels=choose_kernels("cpu"), scale=1.0)
    with set_current_vllm_config(config):
        return M3SparseCacheLayer(session=session, num_kv_heads=4, head_dim=128, prefix="layer")


def test_int8_index_keys_and_their_scales_share_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_PLUGIN_INDEX_KEYS", "int8")
    config = VllmConfig()
    layer = index_layer(config)
    spec = layer.index_cache.get_kv_cache_spec(config)
    assert isinstance(spec, MLAAttentionSpec)
    assert spec.page_size_bytes == 128 * 130
    layer.bind_kv_cache(torch.zeros(3, 4, 128, 256).bfloat16())
    memory = torch.zeros(3, 1, 128, spec.head_size, dtype=spec.dtype)
    layer.index_cache.bind_kv_cache(memory)
    caches = layer.paged_caches()
    assert caches.index_k_pages.shape == (3, 128, 128)
    assert caches.index_k_pages.dtype == torch.int8
    assert caches.index_k_scales is not None
    assert caches.index_k_scales.shape == (3, 128)
    caches.index_k_pages.fill_(1)
    caches.index_k_scales.fill_(1 / 3)
    assert (memory != 0).all()


def test_two_planes_and_their_scales_share_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_PLUGIN_INDEX_KEYS", "planes")
    config = VllmConfig()
    layer = index_layer(config)
    spec = layer.index_cache.get_kv_cache_spec(config)
    assert isinstance(spec, MLAAttentionSpec)
    assert spec.page_size_bytes == 128 * 258
    layer.bind_kv_cache(torch.zeros(3, 4, 128, 256).bfloat16())
    memory = torch.zeros(3, 1, 128, spec.head_size, dtype=spec.dtype)
    layer.index_cache.bind_kv_cache(memory)
    caches = layer.paged_caches()
    assert caches.index.dtype == torch.int16
    assert caches.index_k_low is not None
    assert caches.index_k_scales is not None
    caches.index_k_pages.fill_(1)
    caches.index_k_low.fill_(1)
    caches.index_k_scales.fill_(1 / 3)
    assert (memory.view(torch.int8) != 0).all()


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)],
)
def test_vllms_own_option_for_index_keys_is_heeded(option: str, dtype: torch.dtype) -> None:
    config = VllmConfig()
    layer = index_layer(config, indexer_kv_dtype=option)
    spec = layer.index_cache.get_kv_cache_spec(config)
    assert isinstance(spec, MLAAttentionSpec)
    assert (spec.dtype, spec.head_size) == (dtype, 128)


@pytest.mark.parametrize("option", ["mxfp4", "nvfp4"])
def test_index_keys_no_kernel_reads_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"got '{option}'; for 8 bits .* M3_PLUGIN_INDEX_KEYS"):
        index_layer(VllmConfig(), indexer_kv_dtype=option)


def test_index_keys_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3_PLUGIN_INDEX_KEYS", "int8")
    with pytest.raises(ValueError, match=r"asked for once: .*; got 'fp8' and 'int8'"):
        index_layer(VllmConfig(), indexer_kv_dtype="fp8")


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("fp8", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("auto", torch.bfloat16),
    ],
)
def test_fp8_pages_reach_the_kernels_as_fp8_with_their_scales(
    option: str, dtype: torch.dtype
) -> None:
    """vLLM allocates bytes; index keys stay in the model's dtype, in the same group of pages."""
    config = VllmConfig()
    config.cache_config.cache_dtype = option  # type: ignore[assignment]
    layer = index_layer(config)
    main, index = layer.get_kv_cache_spec(config), layer.index_cache.get_kv_cache_spec(config)
    assert isinstance(main, FullAttentionSpec)
    assert isinstance(index, MLAAttentionSpec)
    assert main.page_size_bytes == 128 * 4 * 256 * dtype.itemsize
    assert index.dtype == torch.bfloat16
    layer.bind_kv_cache(torch.zeros(3, 4, 128, 256, dtype=main.dtype))
    layer.index_cache.bind_kv_cache(torch.zeros(3, 1, 128, 128, dtype=index.dtype))
    scales = CacheScales(torch.rand(4), torch.rand(1))
    assert layer.paged_caches().k_scale is None
    layer.set_scales(scales)
    caches = layer.paged_caches()
    assert caches.k_pages.dtype == caches.v_pages.dtype == dtype
    assert caches.k_pages.shape == caches.v_pages.shape == (3, 4, 128, 128)
    assert caches.v_pages.data_ptr() - caches.k_pages.data_ptr() == 128 * dtype.itemsize
    # a checkpoint may ship scales for a cache that the server keeps in 16 bits: not for these
    expected = (scales.k, scales.v) if dtype.itemsize == 1 else (None, None)
    assert (caches.k_scale, caches.v_scale) == expected


def prompt(rows: int) -> tuple[list[torch.Tensor], HeadNorms, torch.Tensor]:
    """Projections of a prompt in bf16, the norms of its heads, and its rows' angles."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    heads = [normal(rows, count, 128) for count in (8, 4, 4, 4)]
    norms = HeadNorms(*(normal(128) for _ in range(4)), eps=1e-6)
    angles = RowAngles(rotary_dim=64, theta=5e6)(torch.arange(rows))
    return [*heads, normal(rows, 128)], norms, angles


def test_the_op_runs_the_session_on_the_steps_rows_alone() -> None:
    """Rows past the step, as graphs have them, change nothing and become zero.

    Without metadata, as in a profiling run, all rows do.
    """
    rows, padding = 130, 6
    config = VllmConfig()
    layer = index_layer(config)
    plan = layer.session.plan(
        MSABatch(
            cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32),
            seq_lens=torch.tensor([rows], dtype=torch.int32),
            page_table=torch.tensor([[2, 0]], dtype=torch.int32),
            slot_mapping=(torch.arange(rows) + 2 * 128) % (3 * 128),
            max_query_len=rows,
            max_seq_len=rows,
        )
    )
    metadata = {
        "layer": M3Metadata(plan),
        "layer.index_cache": M3IndexMetadata(plan.batch.slot_mapping),
    }
    projected, norms, angles = prompt(rows + padding)
    projected[0][rows:] = torch.nan
    layers = {"layer": layer}

    def empty() -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.full((3, 4, 128, 256), torch.nan).bfloat16()
        return nothing, torch.full((3, 1, 128, 128), torch.nan).bfloat16()

    for cache, pages in zip((layer, layer.index_cache), empty(), strict=True):
        cache.bind_kv_cache(pages)
    with override_forward_context(ForwardContext(layers, metadata, {})):
        found = layer(*projected, norms=norms, cos_sin=angles)
    with override_forward_context(ForwardContext(layers, None, {})):  # type: ignore[arg-type]
        assert not layer(*projected, norms=norms, cos_sin=angles).any()

    for cache, pages in zip((layer, layer.index_cache), empty(), strict=True):
        cache.bind_kv_cache(pages)
    expected = torch.empty_like(projected[0][:rows])
    layer.session.run(
        plan,
        *(part[:rows] for part in projected),
        norms=norms,
        cos_sin=angles[:rows],
        caches=layer.paged_caches(),
        out=expected,
    )
    assert torch.equal(found[:rows], expected)
    assert expected.isfinite().all()
    assert not found[rows:].any()
