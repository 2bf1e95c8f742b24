"""MiniMax-M3's MTP module as vLLM's draft model, method "mtp".

vLLM rewrites the draft's config to architecture `MiniMaxM3MTP` whatever the target was called
(`SpeculativeConfig.hf_config_override`); registering that name is all it takes to be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.utils import _merge_multimodal_embeddings, maybe_prefix
from vllm.sequence import IntermediateTensors

from m3_plugin.attention.session import MSASession
from m3_plugin.checkpoint.loading import WeightLoader
from m3_plugin.checkpoint.names import TEXT_PREFIX, layer_prefixes, require_mtp_modules
from m3_plugin.checkpoint.plan import WeightPlan
from m3_plugin.checkpoint.updates import noting_names
from m3_plugin.model.config import M3Config
from m3_plugin.model.mtp import mtp_config, mtp_input
from m3_plugin.model.rope import RowAngles
from m3_vllm.model import M3DecoderLayer, M3ForCausalLM, read_plan, require_planned
from m3_vllm.norms import HiddenNorm
from m3_vllm.own_products import use_own_products
from m3_vllm.session import worker_session
from m3_vllm.speculation import count_draft_modules
from m3_vllm.updates import ServedWeights
from m3_vllm.weights import mtp_weight_loader, unread_experts

logger = init_logger("vllm.m3_plugin.mtp")


class M3MTPModule(nn.Module):
    """One module: the two norms, their projection and one decoder layer with its own caches."""

    def __init__(
        self,
        config: M3Config,
        *,
        index: int,
        session: MSASession,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.enorm = HiddenNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = HiddenNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.eh_proj",
        )
        self.transformer_layer = M3DecoderLayer(
            config,
            layer=index,
            session=session,
            vllm_config=vllm_config,
            prefix=f"{prefix}.transformer_layer",
        )
        self.final_layernorm = HiddenNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, embeddings: Tensor, positions: Tensor, cos_sin: Tensor, hidden_states: Tensor
    ) -> Tensor:
        """[rows, hidden] before `final_layernorm`: what the next application takes as its state."""
        rows = mtp_input(embeddings, hidden_states, positions, enorm=self.enorm, hnorm=self.hnorm)
        hidden_states, _ = self.eh_proj(rows)
        hidden_states, residual = self.transformer_layer(positions, cos_sin, hidden_states, None)
        return hidden_states + residual


class M3MTPModel(nn.Module):
    """All modules of the checkpoint; the embedding is the target's, which vLLM sets after loading.

    Pipeline stages after the first have no target embedding to share and load one of their own.
    """

    def __init__(
        self, config: M3Config, *, vllm_config: VllmConfig, prefix: str, plan: WeightPlan | None
    ) -> None:
        super().__init__()
        session = worker_session(config, vllm_config)
        assert session is not None
        self.session = session
        self.embed_tokens: nn.Module
        self.has_embedding = get_pp_group().world_size > 1
        if self.has_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.angles = RowAngles.of(config)
        self.modules_in_order: list[M3MTPModule] = []
        for index, name in enumerate(layer_prefixes(config, draft=True)):
            module = M3MTPModule(
                config,
                index=index,
                session=session,
                vllm_config=vllm_config,
                prefix=f"{prefix}.mtp.layers.{index}",
            )
            require_planned(module.transformer_layer, plan, vllm_config=vllm_config, name=name)
            self.modules_in_order.append(module)
        # parameters carry the checkpoint's names
        self.mtp = nn.ModuleDict({"layers": nn.ModuleList(self.modules_in_order)})


class M3MTP(nn.Module):
    """The draft model.

    One module is applied again for every further token; with several, step i takes module i modulo
    their number where the runner says which step it is. vLLM's V1 runner (the one on CPU) does not:
    there module 0 drafts every token.
    """

    supports_multimodal_embeddings: ClassVar = True
    packed_modules_mapping = M3ForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        draft = vllm_config.speculative_config.draft_model_config
        self.config = draft.hf_config
        self.checkpoint = draft.model
        self.parallel_config = vllm_config.parallel_config
        count = count_draft_modules(draft, load_format=str(vllm_config.load_config.load_format))
        self.m3_config = mtp_config(self.config.to_dict(), num_modules=count)
        self.m3_config.require_paged_host()
        self.model = M3MTPModel(
            self.m3_config,
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            plan=read_plan(vllm_config, draft, self.m3_config, draft=True),
        )
        use_own_products(self)
        # the target's, which vLLM sets after loading
        self.lm_head: nn.Module
        self.logits_processor = LogitsProcessor(self.m3_config.vocab_size)
        self.served = ServedWeights(self, text=self.weight_loader, model_config=draft)
        logger.info(
            "m3-plugin: drafting with %d MTP module(s) from %s; MSA kernels: %s",
            count,
            self.checkpoint,
            self.model.session.kernels.family,
        )

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of the next tokens, those of images and videos in their places."""
        if not multimodal_embeddings or is_multimodal is None:
            return self.model.embed_tokens(input_ids)
        # placeholders may lie outside the vocabulary
        text = self.model.embed_tokens(input_ids.masked_fill(is_multimodal, 0))
        return _merge_multimodal_embeddings(
            text, multimodal_embeddings=multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.model.embed_tokens(input_ids)
        module = self._module(spec_step_idx)
        return module(inputs_embeds, positions, self.model.angles(positions), hidden_states)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        """Logits of what `forward` returned, by the target's head."""
        normed = self._module(spec_step_idx).final_layernorm(hidden_states)
        return self.logits_processor(self.lm_head, normed)

    def _module(self, step: int) -> M3MTPModule:
        return self.model.modules_in_order[step % len(self.model.modules_in_order)]

    def weight_loader(self) -> WeightLoader:
        """A loader for the modules' tensors; it passes over everything of the target's."""
        return mtp_weight_loader(
            self,
            config=self.m3_config,
            embedding=self.model.has_embedding,
            unread=unread_experts(self.m3_config, self.parallel_config),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.served.serves:
            return self.served.load(weights)
        names: list[str] = []
        try:
            return self.served.load(noting_names(weights, names))
        finally:
            # the clearer of two errors
            own = [name.removeprefix(TEXT_PREFIX) for name in names]
            require_mtp_modules(own, checkpoint=self.checkpoint)
