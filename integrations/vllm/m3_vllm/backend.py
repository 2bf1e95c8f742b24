"""vLLM's metadata -> MSABatch, and the two attention backends whose caches share one KV group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.session import MSAPlan
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_vllm.compat import device_type


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


class M3IndexMetadataBuilder(AttentionMetadataBuilder[M3IndexMetadata]):
    """Reports only where the index-key cache stores, for the check in the attention op."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

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
        if device_type() != "cpu":
            return None
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend.supported_kv_cache_layouts()


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
