"""Dense layers on vLLM's CPU platform through our kernel, as an attention backend of vLLM's kind.

vLLM's own CPU backend keeps keys transposed and in tiles, as its kernel wants them on each chip.
A layer's pages are read by its own backend alone, so ours keeps K beside V in each slot, as MSA
layers do. All else (spec, layout of blocks, sizes of pages, metadata) is vLLM's CPU backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.dense import DenseAttention
from m3_plugin.settings import Settings
from m3_vllm.backend import dense_choice, msa_batch
from m3_vllm.caches import M3SparseCacheLayer


@dataclass
class M3DenseMetadata(CPUAttentionMetadata):
    """vLLM's, for layers that keep its kernel, and the step as ours reads it."""

    batch: MSABatch | None = None


class M3DenseMetadataBuilder(CPUAttentionMetadataBuilder):
    """Adds our description of the step to vLLM's."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> M3DenseMetadata:
        host = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return M3DenseMetadata(**vars(host), batch=msa_batch(common_attn_metadata))


class M3DenseImpl(CPUAttentionBackendImpl):
    """One dense layer: stores K and V in its pages, then attends to all of them."""

    dense: DenseAttention | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.dense = None
        choice = dense_choice(get_current_vllm_config())
        if choice.backend is not None and self.is_plain():
            self.dense = DenseAttention(choice.backend, settings=Settings.from_environment())

    def is_plain(self) -> bool:
        """Whether the layer is causal attention over everything: nothing else is computed here."""
        non_causal = get_current_vllm_config().attention_config.use_non_causal
        return (
            self.attn_type == AttentionType.DECODER
            and self.sliding_window == -1
            and self.alibi_slopes is None
            and self.sinks is None
            and not self.logits_soft_cap
            and not non_causal
        )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.dense is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        rows = min(len(key), len(slot_mapping))
        k_pages, v_pages = kv_cache.split(self.head_size, dim=-1)
        self.dense.store(
            key[:rows], value[:rows], k_pages, v_pages, slot_mapping=slot_mapping[:rows]
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.dense is None or attn_metadata is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        assert isinstance(attn_metadata, M3DenseMetadata)
        assert attn_metadata.batch is not None
        rows = attn_metadata.num_actual_tokens
        k_pages, v_pages = kv_cache.split(self.head_size, dim=-1)
        self.dense.attend(
            attn_metadata.batch,
            query[:rows],
            k_pages,
            v_pages,
            scale=self.scale,
            out=output[:rows],
        )
        return output


class M3DenseBackend(CPUAttentionBackend):
    """Backend of the target's dense layers on a CPU."""

    @staticmethod
    def get_name() -> str:
        # one of the names that vLLM has in every release; by it a decoding engine sees that the
        # pages of a prefilling one lie otherwise
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return M3DenseImpl

    @staticmethod
    def get_builder_cls() -> type[M3DenseMetadataBuilder]:
        return M3DenseMetadataBuilder


class M3DraftDenseImpl(M3DenseImpl):
    """A layer that vLLM chose the backend of: ours beside an M3, vLLM's own in any other model."""

    def is_plain(self) -> bool:
        return super().is_plain() and _beside_m3(get_current_vllm_config())


class M3DraftDenseBackend(M3DenseBackend):
    """Backend of a draft model's layers, which ask vLLM and not us (`speculation`)."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return M3DraftDenseImpl


def _beside_m3(vllm_config: VllmConfig) -> bool:
    """Whether layers of ours have been built in this configuration."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return any(
        isinstance(layer, M3SparseCacheLayer)
        or (isinstance(layer, Attention) and layer.attn_backend is M3DenseBackend)
        for layer in layers
    )
