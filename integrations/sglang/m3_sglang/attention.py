"""Attention layers of MiniMax-M3 from SGLang's projections and norms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from torch import Tensor, nn

from m3_kernels.norm_rope_store import HeadNorms
from m3_plugin.attention.sharing import shares_scans
from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.model.config import M3Config, local_heads
from m3_plugin.settings import Settings
from m3_sglang.compat import (
    attention_parallel_rank,
    attention_parallel_size,
    attention_partition,
    partition_shared_by,
    takes_adapters,
)
from m3_sglang.norms import norm_and_rotate

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def can_be_joined(*layers: nn.Module) -> bool:
    """Whether the weights of linear layers are 16-bit numbers in rows: not quantised, not packed.

    SGLang packs those of a CPU once they are loaded.
    """
    return all(
        type(layer.quant_method) is UnquantizedLinearMethod
        and layer.get_parameter("weight").device.type != "cpu"
        for layer in layers
    )


def join_rows(*layers: nn.Module) -> Any:
    """Lay the weights of linear layers behind one another, for one product in place of several.

    They stay parameters of their layers, so that loads and updates find them, as rows of one
    tensor: what is given to the `quant_method.apply` of any of them.
    """
    weights = [layer.get_parameter("weight") for layer in layers]
    joined = torch.cat([weight.data for weight in weights])
    for weight, rows in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = rows
    return SimpleNamespace(weight=joined)


class _M3AttentionBase(nn.Module):
    """Main projections and per-head Gemma QK norms, common to both kinds of layer."""

    def __init__(
        self,
        config: M3Config,
        *,
        layer: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        tp_size = attention_parallel_size()
        self.head_dim = config.head_dim
        self.num_heads = local_heads(config.num_attention_heads, tp_size)
        self.num_kv_heads = local_heads(config.num_key_value_heads, tp_size)
        self.split_sizes = [
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        ]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            **attention_partition(),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            # the sum over ranks goes with the norm behind it (`RankSums`)
            reduce_results=False,
            prefix=f"{prefix}.o_proj",
            **attention_partition(),
        )
        self.eps = config.rms_norm_eps
        self.q_norm = GemmaRMSNorm(self.head_dim, eps=self.eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, eps=self.eps)
        self.attn = RadixAttention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Main q, k, v of the step before norm and RoPE: [tokens, heads * head_dim] each."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.split_sizes, dim=-1)
        return q, k, v


class M3DenseAttention(_M3AttentionBase):
    """Causal GQA over the whole context (the first layers); the backend says by which kernel."""

    def __init__(
        self,
        config: M3Config,
        *,
        layer: int,
        rope: nn.Module,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__(config, layer=layer, quant_config=quant_config, prefix=prefix)
        # one RoPE for all layers, in a tuple so that it is no part of each of them
        self.rope = (rope,)

    def norm_and_rope(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise each head, then rotate its first `rotary_dim` channels.

        Parameters
        ----------
        q, k : [tokens, heads * head_dim], returned in the same shape
        """
        tokens = q.shape[0]
        q = self.q_norm(q.reshape(-1, self.head_dim)).view(tokens, -1)
        k = self.k_norm(k.reshape(-1, self.head_dim)).view(tokens, -1)
        return self.rope[0](positions, q, k)

    def forward(
        self,
        positions: Tensor,
        cos_sin: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
    ) -> Tensor:
        # called as MSA layers are; dense layers rotate by positions and leave cos_sin alone
        qkv, _ = self.qkv_proj(hidden_states)
        done = norm_and_rotate(
            qkv,
            positions,
            norms=(self.q_norm, self.k_norm),
            rope=self.rope[0],
            heads=(self.num_heads, self.num_kv_heads),
        )
        q, k, v = qkv.split(self.split_sizes, dim=-1)
        if not done:
            q, k = self.norm_and_rope(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output


class M3SparseAttention(_M3AttentionBase):
    """MSA: beside the main branch an index branch, which chooses the blocks to attend to.

    Norm modules own the weights of their norms; the session applies them, with RoPE, where it
    stores keys.
    """

    def __init__(
        self,
        config: M3Config,
        *,
        layer: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__(config, layer=layer, quant_config=quant_config, prefix=prefix)
        msa = config.msa
        assert msa is not None
        if msa.index_dim != config.head_dim:
            raise ValueError(
                "config key 'sparse_attention_config.sparse_index_dim' must equal "
                f"head_dim={config.head_dim} (RoPE is shared); got {msa.index_dim}"
            )
        tp_size = attention_parallel_size()
        # Index query heads follow the KV heads, also when ranks exceed them and share a head; ranks
        # that share scans have all of them. The single index key is on every rank.
        together = shares_scans(Settings.from_environment(), tp_size)
        sharing = tp_size if together else max(1, tp_size // msa.num_index_heads)
        self.num_index_heads = local_heads(msa.num_index_heads, tp_size // sharing)
        self.index_qkv_proj = QKVParallelLinear(
            config.hidden_size,
            msa.index_dim,
            msa.num_index_heads,
            total_num_kv_heads=1,
            bias=False,
            quant_config=quant_config,
            v_head_size=0,
            prefix=f"{prefix}.index_qkv_proj",
            **partition_shared_by(sharing),
        )
        self.index_q_norm = GemmaRMSNorm(msa.index_dim, eps=self.eps)
        self.index_k_norm = GemmaRMSNorm(msa.index_dim, eps=self.eps)
        self.index_split_sizes = [self.num_index_heads * msa.index_dim, msa.index_dim]
        # an adapter reads and adds to each projection by itself
        projections = (self.qkv_proj, self.index_qkv_proj)
        joins = can_be_joined(*projections) and not takes_adapters()
        self.joined = join_rows(*projections) if joins else None
        self.total_kv_heads = config.num_key_value_heads
        self.cache_scales = CacheScales()
        self.scales_are_read = False

    def take_cache_scales(self, scales: CacheScales) -> None:
        """Keep this rank's part of the layer's scales for an fp8 cache; the backend asks for it.

        Where they are read already, by graphs too, new ones are written in the place of the old.

        Raises
        ------
        ValueError : weights with scales follow weights that had none.
        """
        own = scales.of_rank(
            num_kv_heads=self.total_kv_heads,
            rank=attention_parallel_rank(),
            size=attention_parallel_size(),
            device=self.q_norm.get_parameter("weight").device,
        )
        if not self.scales_are_read:
            self.cache_scales = own
            return
        for old, new in ((self.cache_scales.k, own.k), (self.cache_scales.v, own.v)):
            if old is not None:
                old.copy_(torch.ones_like(old) if new is None else new)
            elif new is not None:
                raise ValueError(
                    "these weights have scales for an fp8 KV cache, those that the server was "
                    "started with had none; restart it with these"
                )

    def scales_for(self, cache_dtype: torch.dtype) -> CacheScales:
        """Scales of this rank's pages; tensors that stay, whatever is loaded later."""
        scales = self.cache_scales.for_pages(cache_dtype)
        self.scales_are_read = cache_dtype.itemsize == 1
        return scales

    def head_norms(self) -> HeadNorms:
        """The norms of q, k, index q and index k."""
        return HeadNorms(
            q=self.q_norm.weight,
            k=self.k_norm.weight,
            index_q=self.index_q_norm.weight,
            index_k=self.index_k_norm.weight,
            eps=self.eps,
        )

    def project_with_index(self, hidden_states: Tensor) -> list[Tensor]:
        """q, k, v, index q and index k of the step: [tokens, heads * channels] each."""
        if self.joined is not None:
            method: Any = self.qkv_proj.quant_method
            rows = method.apply(self.joined, hidden_states)
            return list(rows.split([*self.split_sizes, *self.index_split_sizes], dim=-1))
        index, _ = self.index_qkv_proj(hidden_states)
        return [*self.project(hidden_states), *index.split(self.index_split_sizes, dim=-1)]

    def forward(
        self,
        positions: Tensor,
        cos_sin: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
    ) -> Tensor:
        q, k, v, index_q, index_k = self.project_with_index(hidden_states)
        index_q = index_q.unflatten(-1, (self.num_index_heads, -1))
        _, attended = self.attn(
            q, k, v, forward_batch, idx_q=index_q, idx_k=index_k, cos_sin=cos_sin
        )
        output, _ = self.o_proj(attended)
        return output
