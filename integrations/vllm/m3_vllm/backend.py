"""vLLM's metadata -> MSABatch, and the two attention backends whose caches share one KV group."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_layout import KVCacheLayout

from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.dense import DenseChoice, choose_dense
from m3_plugin.attention.session import MSAPlan
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_plugin.settings import Settings
from m3_vllm.compat import device_major, device_type

logger = init_logger("vllm.m3_plugin.backend")

# What serves the dense layers where vLLM's own choice has no pages of 128 tokens, in this order.
_DENSE_FALLBACKS = ("FLASH_ATTN", "TRITON_ATTN")
# Ours for CPUs, by name as vLLM names its own: only a CPU needs vLLM's module that it derives from.
_CPU_DENSE_BACKEND = "m3_vllm.cpu_dense.M3DenseBackend"


@dataclass
class M3Metadata(AttentionMetadata):
    """Plan of one step, shared by all MSA layers of a KV cache group."""

    plan: MSAPlan


@dataclass
class M3IndexMetadata(AttentionMetadata):
    """Where the index-key cache's group stores this step: must be where the main cache's does."""

    slot_mapping: torch.Tensor


def msa_batch(common: CommonAttentionMetadata) -> MSABatch:
    """Translate one step; views only, host integers only, so that a CUDA graph can replay it."""
    return MSABatch(
        cu_seqlens_q=common.query_start_loc[: common.num_reqs + 1],
        seq_lens=common.seq_lens[: common.num_reqs],
        page_table=common.block_table_tensor[: common.num_reqs],
        slot_mapping=common.slot_mapping[: common.num_actual_tokens],
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
    )


class M3MetadataBuilder(AttentionMetadataBuilder[M3Metadata]):
    """Plans the step once for every MSA layer of the group."""

    # Row counts and addresses are fixed by vLLM's persistent buffers for uniform batches.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # All steps of a draft go into one graph, then.
    supports_draft_decode_metadata_update = True

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.session = layers[layer_names[0]].session

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> M3Metadata:
        return M3Metadata(plan=self.session.plan(msa_batch(common_attn_metadata)))

    def update_draft_decode_metadata(self, metadata: M3Metadata) -> None:
        self.session.replan(metadata.plan)


class M3IndexMetadataBuilder(AttentionMetadataBuilder[M3IndexMetadata]):
    """Reports only where the index-key cache stores, for the check in the attention op."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_draft_decode_metadata_update = True

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> M3IndexMetadata:
        return M3IndexMetadata(slot_mapping=common_attn_metadata.slot_mapping)

    def update_draft_decode_metadata(self, metadata: M3IndexMetadata) -> None:
        # vLLM writes the slots where this points
        return


class _M3PagedBackend(AttentionBackend):
    """What both caches share: a 128-token page, and layers that call no `AttentionImpl`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_impl_cls() -> Any:
        # vLLM asks only for capabilities (DCP, PCP) and takes this as "none".
        raise NotImplementedError("MSA layers run through their own custom op")

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [PAGED_BLOCK_SIZE]

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        # The kernels take any strides. Yet pipeline stages must all name the same layouts, and a
        # stage may hold MSA layers only, so the dense backend's wish is repeated where it has one.
        if device_type() == "cpu":
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            return CPUAttentionBackend.supported_kv_cache_layouts()
        if device_major() == 10:
            # as FlashInfer, the dense layers' default there, which need not be installed
            return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
        return None


class M3SparseBackend(_M3PagedBackend):
    """Backend of the main K/V cache of an MSA layer."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        *_M3PagedBackend.supported_kv_cache_dtypes,
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
    ]

    @staticmethod
    def get_name() -> str:
        return "M3_MSA"

    @staticmethod
    def get_builder_cls() -> type[M3MetadataBuilder]:
        return M3MetadataBuilder


class M3IndexBackend(_M3PagedBackend):
    """Backend of the index-key cache of an MSA layer: one vector per token, no value."""

    @staticmethod
    def get_name() -> str:
        return "M3_MSA_INDEX"

    @staticmethod
    def get_builder_cls() -> type[M3IndexMetadataBuilder]:
        return M3IndexMetadataBuilder


def dense_backend_problem(backend: Any, *, cache_dtype: str) -> str | None:
    """Why a dense attention backend cannot work beside MSA pages, None if it can.

    Both kinds of layer share a KV cache group and so its kernel page: a backend of smaller pages
    could cut ours into several, but MSA cannot read them.

    Parameters
    ----------
    backend : vLLM's `AttentionBackend` class
    cache_dtype : of the dense layers' cache, as in `--kv-cache-dtype`
    """
    sizes = backend.get_supported_kernel_block_sizes()
    if sizes and not any(
        PAGED_BLOCK_SIZE % s.base == 0 if isinstance(s, MultipleOf) else s == PAGED_BLOCK_SIZE
        for s in sizes
    ):
        return f"has no pages of {PAGED_BLOCK_SIZE} tokens, which MSA needs (it has {sizes})"
    if not backend.supports_kv_cache_dtype(cache_dtype):
        return f"cannot read a {cache_dtype} KV cache"
    return None


def dense_choice(vllm_config: VllmConfig) -> DenseChoice:
    """Whether our kernel attends in dense layers, as it does on a CPU.

    An attention backend that the operator named is theirs to have.
    """
    attention = vllm_config.attention_config
    return choose_dense(
        device_type(),
        cache_dtype=kv_cache_dtype_str_to_dtype(
            vllm_config.cache_config.cache_dtype, vllm_config.model_config
        ),
        settings=Settings.from_environment(),
        named=attention.backend is not None or bool(attention.backend_per_kind),
    )


def dense_backend(vllm_config: VllmConfig, *, head_dim: int) -> type[AttentionBackend]:
    """The backend of the dense layers: ours on a CPU, elsewhere vLLM's choice.

    Or the next one if that has no such pages: vLLM chooses before it knows the page, on some
    machines a backend of small pages: FlashInfer, where its kernels for Blackwell cannot be used.

    Raises
    ------
    ValueError : the user named one that has no such pages, or nothing else can run.
    """
    if dense_choice(vllm_config).backend is not None:
        return resolve_obj_by_qualname(_CPU_DENSE_BACKEND)
    cache_dtype = vllm_config.cache_config.cache_dtype
    chosen = get_attn_backend(
        head_size=head_dim, dtype=vllm_config.model_config.dtype, kv_cache_dtype=cache_dtype
    )
    problem = dense_backend_problem(chosen, cache_dtype=cache_dtype)
    if problem is None:
        return chosen
    said = f"the dense layers' attention backend {chosen.get_name()} {problem}"
    attention = vllm_config.attention_config
    if attention.backend is None and not attention.backend_per_kind:
        for name in _DENSE_FALLBACKS:
            with suppress(ImportError):
                other = getattr(AttentionBackendEnum, name).get_class()
                if dense_backend_problem(other, cache_dtype=cache_dtype) is None:
                    logger.warning("m3-plugin: %s; %s takes its place", said, name)
                    return other
    raise ValueError(
        f"{said}; name another with --attention-backend, such as "
        f"{' or '.join(_DENSE_FALLBACKS)}, or leave it out"
    )
