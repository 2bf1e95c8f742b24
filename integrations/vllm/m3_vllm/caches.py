"""Cache ownership of an MSA layer inside vLLM, and the opaque op that runs it.

Main K/V and index keys are two `AttentionLayerBase` entries of the static forward context. Their
specs share one uniform base, so vLLM puts them into one KV cache group: one block table, allocated,
prefix-cached, preempted and evicted in lock-step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.kv_transfer import (
    get_kv_transfer_group,
    has_kv_transfer_group,
    is_v1_kv_transfer_group,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op, kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SparseCacheRole,
    get_kv_quant_mode,
)

from m3_kernels.index_pages import channels, views_of
from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_plugin.attention.backends import INDEX_KEYS
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.warm_up import warm_up
from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.settings import Settings
from m3_vllm.backend import M3IndexBackend, M3IndexMetadata, M3Metadata, M3SparseBackend

if TYPE_CHECKING:
    from torch import Tensor


# vLLM allocates fp8 caches as bytes and leaves their meaning to the backend.
_FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


_INDEX_DTYPES = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}


def index_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Storage dtype of index keys: in 8 bits, which may choose other blocks, only on request.

    Otherwise as K and V, in the model's dtype beside fp8 ones.

    Raises
    ------
    ValueError : vLLM's indexer_kv_dtype is none the kernels read, or is given beside ours.
    """
    requested = vllm_config.attention_config.indexer_kv_dtype
    asked = Settings.from_environment().index_keys
    if asked != "auto":
        if requested != "auto":
            raise ValueError(
                "index keys must be asked for once: leave indexer_kv_dtype out of "
                f"--attention-config or unset M3_PLUGIN_INDEX_KEYS; got {requested!r} and {asked!r}"
            )
        return INDEX_KEYS[asked]
    if requested != "auto":
        if requested not in _INDEX_DTYPES:
            raise ValueError(
                f"indexer_kv_dtype in --attention-config must be auto, {', '.join(_INDEX_DTYPES)} "
                f"for MSA layers; got {requested!r}; for 8 bits on any chip set "
                "M3_PLUGIN_INDEX_KEYS=int8"
            )
        return _INDEX_DTYPES[requested]
    if vllm_config.cache_config.cache_dtype in _FP8_DTYPES:
        return vllm_config.model_config.dtype
    return cache_dtype(vllm_config)


def cache_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Storage dtype of K and V.

    Raises
    ------
    ValueError : a cache dtype the kernels cannot read; vLLM does not ask the layer's backend.
    """
    requested = vllm_config.cache_config.cache_dtype
    if not M3SparseBackend.supports_kv_cache_dtype(requested):
        supported = ", ".join(M3SparseBackend.supported_kv_cache_dtypes)
        raise ValueError(
            f"--kv-cache-dtype must be one of {supported} for MSA layers in this version of "
            f"m3-plugin; got {requested}"
        )
    if requested in _FP8_DTYPES:
        return _FP8_DTYPES[requested]
    return kv_cache_dtype_str_to_dtype(requested, vllm_config.model_config)


class M3IndexCache(nn.Module, AttentionLayerBase):
    """Index-key pages of one MSA layer, one vector per token.

    Keys in int8 or two planes bring a scale each, which vLLM takes for further channels.

    Attributes
    ----------
    keys : [pages, 128, index_dim], views of `kv_cache`; empty before one is bound
    scales, low : as in `MSACaches`
    """

    supports_dcp = False

    def __init__(
        self, *, prefix: str, index_dim: int, dtype: torch.dtype, on_bound: Callable[[], None]
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.on_bound = on_bound
        self.dtype = dtype
        self.width = channels(index_dim, dtype)
        self.kv_cache = torch.tensor([])
        _register_layer(prefix, self)

    @property
    def kv_cache(self) -> Tensor:
        """What vLLM has bound, empty before. Setting it lets go of everything made of the old one.

        vLLM sets it to take a cache away; a view that stayed would keep the whole allocation.
        """
        return self._pages

    @kv_cache.setter
    def kv_cache(self, pages: Tensor) -> None:
        self._pages = pages
        self.keys = pages
        self.scales: Tensor | None = None
        self.low: Tensor | None = None

    def get_attn_backend(self) -> type[M3IndexBackend]:
        return M3IndexBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # A key-only spec: budgets one vector per token where a K/V spec would budget two.
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            dtype=self.dtype,
            cache_role=SparseCacheRole.INDEXER,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        # [pages, 1, page_size, width], as connectors read and write it
        self.kv_cache = kv_cache
        self.keys = kv_cache.squeeze(1)
        if kv_cache.numel():
            self.keys, self.scales, self.low = views_of(self.keys)
        self.on_bound()


class M3SparseCacheLayer(nn.Module, AttentionLayerBase):
    """Main K/V pages of one MSA layer, its index cache, and the call into the session.

    Parameters
    ----------
    session : runs the layer; one per worker
    num_kv_heads, head_dim : per rank
    prefix : unique layer name, the key of vLLM's per-layer metadata
    """

    supports_dcp = False

    def __init__(
        self,
        *,
        session: MSASession,
        num_kv_heads: int,
        head_dim: int,
        prefix: str,
    ) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.session = session
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.layer_name = prefix
        self.dtype = cache_dtype(vllm_config)
        self.index_cache = M3IndexCache(
            on_bound=self.warm_up,
            prefix=f"{prefix}.index_cache",
            index_dim=session.msa.index_dim,
            dtype=index_dtype(vllm_config),
        )
        # Buffers, of which vLLM keeps a copy while a server sleeps without its weights.
        self.k_scale: Tensor | None
        self.v_scale: Tensor | None
        self.register_buffer("k_scale", None, persistent=False)
        self.register_buffer("v_scale", None, persistent=False)
        self.kv_cache = torch.tensor([])
        _register_layer(prefix, self)

    @property
    def kv_cache(self) -> Tensor:
        """What vLLM has bound, empty before; setting it lets go of the views of the old one."""
        return self._pages

    @kv_cache.setter
    def kv_cache(self, pages: Tensor) -> None:
        self._pages = pages
        self.caches: MSACaches | None = None

    def get_attn_backend(self) -> type[M3SparseBackend]:
        return M3SparseBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # said as vLLM says it of its own dense layers, with which this layer shares a group
        requested = vllm_config.cache_config.cache_dtype
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            head_size_v=self.head_dim,
            dtype=kv_cache_dtype_str_to_dtype(requested, vllm_config.model_config),
            kv_quant_mode=get_kv_quant_mode(requested),
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        # [pages, kv heads, page_size, K | V]: two strided views, no copy
        self.kv_cache = kv_cache if kv_cache.numel() == 0 else kv_cache.view(self.dtype)
        self.warm_up()

    def warm_up(self) -> None:
        """Have every kernel compiled for these pages, once both of this layer's caches are there.

        vLLM binds caches before it captures graphs and before it serves, the one for measuring
        graphs among them. Between the two of a layer, one is new and the other of the last time.
        """
        main, index = self.kv_cache, self.index_cache.kv_cache
        if main.numel() and index.numel() and main.shape[0] == index.shape[0]:
            warm_up(self.session, self.paged_caches())

    @property
    def scales(self) -> CacheScales:
        """What an fp8 cache's numbers are multiplied with, of this rank's heads."""
        return CacheScales(self.k_scale, self.v_scale)

    def set_scales(self, scales: CacheScales) -> None:
        """Set `scales`, where captured graphs read the ones before if they are as many."""
        self.k_scale = _kept_in_place(self.k_scale, scales.k)
        self.v_scale = _kept_in_place(self.v_scale, scales.v)
        self.caches = None

    def paged_caches(self) -> MSACaches:
        """The three page tensors as the kernels want them, views of vLLM's allocation."""
        index_pages = self.index_cache.keys
        if self.caches is None or self.caches.index_k_pages is not index_pages:
            k_pages, v_pages = self.kv_cache.split(self.head_dim, dim=-1)
            scales = self.scales.for_pages(k_pages.dtype)
            self.caches = MSACaches(
                k_pages=k_pages,
                v_pages=v_pages,
                index_k_pages=index_pages,
                k_scale=scales.k,
                v_scale=scales.v,
                index_k_scales=self.index_cache.scales,
                index_k_low=self.index_cache.low,
            )
        return self.caches

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        *,
        norms: HeadNorms,
        cos_sin: Tensor,
    ) -> Tensor:
        """Attend; arguments as in `MSASession.store`. Returns [rows, num_q_heads, head_dim]."""
        out = torch.empty_like(q)
        torch.ops.vllm.m3_msa_attention(
            q,
            k,
            v,
            index_q,
            index_k,
            norms.q,
            norms.k,
            norms.index_q,
            norms.index_k,
            norms.eps,
            cos_sin,
            out,
            self.layer_name,
        )
        return out


def _kept_in_place(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """New values in the old tensor's memory, in their own if the old one does not fit."""
    if old is None or new is None or old.shape != new.shape or old.device != new.device:
        return new
    return old.copy_(new)


def _register_layer(prefix: str, layer: AttentionLayerBase) -> None:
    layers = get_current_vllm_config().compilation_config.static_forward_context
    if prefix in layers:
        raise ValueError(f"duplicate attention layer name: {prefix}")
    layers[prefix] = layer


@eager_break_during_capture
def m3_msa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    index_q_weight: torch.Tensor,
    index_k_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """Run one MSA layer on the step of the current forward context, in place into `out`.

    An op of its own so that torch.compile keeps it whole: it reads per-step metadata and paged
    caches which a traced graph must not see as constants. Weights of norms are arguments, so that a
    host which moves or replaces parameters is followed.
    """
    context = get_forward_context()
    if not isinstance(context.attn_metadata, dict):
        # memory profiling and warm-up run without metadata or caches
        out.zero_()
        return
    layer: M3SparseCacheLayer = context.no_compile_layers[layer_name]
    metadata = context.attn_metadata[layer_name]
    index_metadata = context.attn_metadata[layer.index_cache.prefix]
    assert isinstance(metadata, M3Metadata)
    assert isinstance(index_metadata, M3IndexMetadata)
    slots = metadata.plan.batch.slot_mapping
    if slots.data_ptr() != index_metadata.slot_mapping.data_ptr():
        raise RuntimeError(
            f"{layer_name}: vLLM placed the index-key cache in another KV cache group than K/V; "
            "their pages would no longer belong together"
        )
    connector = connector_of_step()
    index_layer = layer.index_cache
    if connector is not None:
        # selection reads every index key, and attention any page it chooses
        connector.wait_for_layer_load(index_layer.prefix)
        connector.wait_for_layer_load(layer_name)
    rows = slots.shape[0]
    layer.session.run(
        metadata.plan,
        q[:rows],
        k[:rows],
        v[:rows],
        index_q[:rows],
        index_k[:rows],
        norms=HeadNorms(q_weight, k_weight, index_q_weight, index_k_weight, eps),
        cos_sin=cos_sin[:rows],
        caches=layer.paged_caches(),
        out=out[:rows],
    )
    out[rows:].zero_()
    if connector is not None:
        connector.save_kv_layer(layer_name, layer.kv_cache, metadata)
        connector.save_kv_layer(index_layer.prefix, index_layer.kv_cache, index_metadata)


def connector_of_step() -> Any:
    """The connector that moves caches layer by layer in this step, None without one.

    vLLM's own layers are decorated (`maybe_transfer_kv_layer`); ours have two caches each.
    """
    if not has_kv_transfer_group() or not is_v1_kv_transfer_group():
        return None
    connector: Any = get_kv_transfer_group()
    return connector if connector.has_connector_metadata() else None


def _m3_msa_attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    index_q_weight: torch.Tensor,
    index_k_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    return


direct_register_custom_op(
    op_name="m3_msa_attention",
    op_func=m3_msa_attention,
    mutates_args=["out"],
    fake_impl=_m3_msa_attention_fake,
)
