"""MiniMax-M3's MTP module as SGLang's draft model, algorithm NEXTN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch import Tensor, nn

from m3_plugin.checkpoint.loading import WeightLoader, require_expert_bytes
from m3_plugin.checkpoint.names import TEXT_PREFIX, layer_prefixes, require_mtp_modules
from m3_plugin.checkpoint.updates import noting_names
from m3_plugin.model.config import M3Config
from m3_plugin.model.mtp import mtp_input
from m3_plugin.model.rope import RowAngles
from m3_sglang.compat import read_draft_config
from m3_sglang.model import (
    M3CausalLM,
    M3DecoderLayer,
    rank_share,
    read_plan,
    require_our_backend,
)
from m3_sglang.moe import activations_as_is
from m3_sglang.own_products import use_own_products
from m3_sglang.sums import RankSums
from m3_sglang.updates import ServedWeights
from m3_sglang.weights import mtp_weight_loader

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class M3MTPModule(nn.Module):
    """The two norms, their projection and one decoder layer with pages of its own."""

    def __init__(
        self,
        config: M3Config,
        *,
        device_type: str,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.device_type = device_type
        self.enorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.eh_proj",
        )
        self.angles = RowAngles.of(config)
        self.sums = RankSums(hidden_size=config.hidden_size, device_type=device_type)
        self.transformer_layer = M3DecoderLayer(
            config,
            layer=0,
            rope=None,
            sums=self.sums,
            device_type=device_type,
            quant_config=quant_config,
            prefix=f"{prefix}.transformer_layer",
        )
        self.final_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
    ) -> tuple[Tensor, Tensor]:
        """[rows, hidden]: what the head reads, and what the next application takes as its state."""
        rows = mtp_input(embeddings, hidden_states, positions, enorm=self.enorm, hnorm=self.hnorm)
        hidden_states, _ = self.eh_proj(rows)
        with activations_as_is(self.device_type):
            added, stream = self.transformer_layer(
                positions, self.angles(positions), hidden_states, None, forward_batch
            )
        return self.sums.normalise(self.final_layernorm, added, stream, forward_batch)


class M3MTPModel(nn.Module):
    """The embedding, which becomes the target's after loading, and the module."""

    def __init__(
        self, config: M3Config, *, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        module = M3MTPModule(
            config,
            device_type=torch.get_default_device().type,
            quant_config=quant_config,
            prefix=f"{prefix}.mtp.layers.0",
        )
        # named as in the checkpoint: model.mtp.layers.0
        self.mtp = nn.ModuleDict({"layers": nn.ModuleList([module])})
        self._module = (module,)

    @property
    def module(self) -> M3MTPModule:
        return self._module[0]


class MiniMaxM3MTP(nn.Module):
    """The draft model; embedding and head are the target's."""

    packed_modules_mapping: ClassVar = M3CausalLM.packed_modules_mapping

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        self.m3_config = read_draft_config(config)
        dot = f"{prefix}." if prefix else ""
        plan = read_plan(config.name_or_path, self.m3_config, draft=True)
        self.model = M3MTPModel(
            self.m3_config, quant_config=quant_config, prefix=f"{dot}language_model.model"
        )
        require_expert_bytes(
            plan,
            self.model.module.transformer_layer.block_sparse_moe.experts,
            layer=layer_prefixes(self.m3_config, draft=True)[0],
            share=rank_share(self.m3_config.intermediate_size),
        )
        self.lm_head = ParallelLMHead(
            self.m3_config.vocab_size,
            self.m3_config.hidden_size,
            quant_config=quant_config,
            prefix=f"{dot}language_model.lm_head",
        )
        self.logits_processor = LogitsProcessor(getattr(config, "text_config", config))
        use_own_products(self.model)
        self.served = ServedWeights(self, text=self.weight_loader, is_draft=True)

    def set_embed_and_head(self, embed: Tensor, head: Tensor) -> None:
        """Take over the target's embedding and head; called by SGLang after loading."""
        self.model.embed_tokens.weight = nn.Parameter(embed, requires_grad=False)
        self.lm_head.weight = nn.Parameter(head, requires_grad=False)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
    ) -> Any:
        require_our_backend()
        spec_info: Any = forward_batch.spec_info
        embeddings = self._embeddings(input_ids, forward_batch, input_embeds)
        hidden_states, state = self.model.module(
            embeddings, positions, spec_info.hidden_states, forward_batch
        )
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch, [state])

    def _embeddings(
        self, input_ids: Tensor, forward_batch: ForwardBatch, input_embeds: Tensor | None
    ) -> Tensor:
        """Of the next tokens; those of pictures come from the target, shifted by SGLang's worker.

        The last token of each request is new to the target, and only its id is there.
        """
        given = forward_batch.mm_input_embeds if input_embeds is None else input_embeds
        if given is None:
            return self.model.embed_tokens(input_ids)
        if not forward_batch.contains_mm_inputs():
            return given
        lengths = forward_batch.extend_seq_lens
        assert lengths is not None
        last = lengths.cumsum(0) - 1
        given[last] = self.model.embed_tokens(input_ids[last])
        return given

    def weight_loader(self) -> WeightLoader:
        """A loader for the module's tensors; it passes over everything of the target's."""
        return mtp_weight_loader(self, config=self.m3_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the module out of a checkpoint of its own or of the target's.

        Raises
        ------
        ValueError : no MTP weights, or some missing.
        """
        if self.served.serves:
            return self.served.load(weights)
        names: list[str] = []
        try:
            return self.served.load(noting_names(weights, names))
        finally:
            # the clearer of two errors
            own = [name.removeprefix(TEXT_PREFIX) for name in names]
            require_mtp_modules(own, checkpoint="the draft checkpoint")


EntryClass = [MiniMaxM3MTP]
