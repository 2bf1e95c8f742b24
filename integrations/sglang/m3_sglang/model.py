"""Text model of MiniMax-M3, built from SGLang's public layers around our MSA attention."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import PPProxyTensors
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_spec
from torch import Tensor, nn

from m3_plugin.checkpoint.loading import (
    WeightLoader,
    expert_share,
    plan_before_loading,
    require_expert_bytes,
)
from m3_plugin.checkpoint.plan import WeightPlan
from m3_plugin.checkpoint.witness import ExpertWitness
from m3_plugin.host.presence import PluginRefusal
from m3_plugin.model.config import M3Config
from m3_plugin.model.rope import RowAngles
from m3_sglang.attention import M3DenseAttention, M3SparseAttention
from m3_sglang.backend import M3AttentionBackend
from m3_sglang.compat import (
    PipelineStage,
    attends_apart,
    expert_cut,
    has_host_cache,
    is_disaggregated,
    pipeline_stage,
    read_config,
    takes_adapters,
)
from m3_sglang.cpu_repairs import exchange_rows
from m3_sglang.disaggregation import prepare_transfers
from m3_sglang.host_cache import prepare_host_cache
from m3_sglang.moe import M3MLP, ExpertProof, M3MoE, activations_as_is
from m3_sglang.ours import FUSED_LAYERS
from m3_sglang.own_products import use_own_products
from m3_sglang.rope import make_rope
from m3_sglang.speculation import prepare_speculation
from m3_sglang.sums import RankSums
from m3_sglang.updates import ServedWeights
from m3_sglang.weights import FUSED, text_weight_loader

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

# What a pipeline stage gives the next: the names are SGLang's, whose graphs have buffers for them.
_HANDED_ON = ("hidden_states", "residual")


class M3DecoderLayer(nn.Module):
    """Pre-norm layer: attention (dense or MSA), then MLP (dense or routed).

    Parameters
    ----------
    rope : of dense layers (`make_rope`); None if the model has none
    sums : of the model
    """

    def __init__(
        self,
        config: M3Config,
        *,
        layer: int,
        rope: nn.Module | None,
        sums: RankSums,
        device_type: str,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.sums = sums
        if config.sparse_layers[layer]:
            self.self_attn: nn.Module = M3SparseAttention(
                config, layer=layer, quant_config=quant_config, prefix=f"{prefix}.self_attn"
            )
        else:
            assert rope is not None
            self.self_attn = M3DenseAttention(
                config,
                layer=layer,
                rope=rope,
                quant_config=quant_config,
                prefix=f"{prefix}.self_attn",
            )
        # the attribute carries the checkpoint's name, which quantisation ignore-lists refer to
        self.feed_forward_name = "block_sparse_moe" if config.moe_layers[layer] else "mlp"
        feed_forward_prefix = f"{prefix}.{self.feed_forward_name}"
        if config.moe_layers[layer]:
            self.block_sparse_moe = M3MoE(
                config,
                layer=layer,
                device_type=device_type,
                quant_config=quant_config,
                prefix=feed_forward_prefix,
            )
        else:
            self.mlp = M3MLP(
                config,
                intermediate_size=config.dense_intermediate_size,
                quant_config=quant_config,
                prefix=feed_forward_prefix,
            )
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: Tensor,
        cos_sin: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        forward_batch: ForwardBatch,
        *,
        summed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> this rank's part of what is added to the stream, and the stream.

        Parameters
        ----------
        cos_sin : of the positions (`RowAngles`), for an MSA layer
        hidden_states : this rank's part of what the layer before adds; the stream itself if
            `residual` is None
        summed : `hidden_states` are of all ranks already
        """
        if residual is None:
            stream = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        elif summed:
            hidden_states, stream = self.input_layernorm(hidden_states, residual)
        else:
            hidden_states, stream = self.sums.normalise(
                self.input_layernorm, hidden_states, residual, forward_batch
            )
        # an idle rank, whose experts may still be asked, has no rows
        if len(hidden_states):
            hidden_states = self.self_attn(positions, cos_sin, hidden_states, forward_batch)
        hidden_states, stream = self.sums.normalise(
            self.post_attention_layernorm, hidden_states, stream, forward_batch
        )
        feed_forward = getattr(self, self.feed_forward_name)
        return self.sums.feed(feed_forward, hidden_states, forward_batch), stream


class M3Model(nn.Module):
    """Embedding, decoder layers of this pipeline stage, final norm."""

    def __init__(
        self,
        config: M3Config,
        *,
        quant_config: QuantizationConfig | None,
        prefix: str,
        plan: WeightPlan | None = None,
    ) -> None:
        super().__init__()
        stage = pipeline_stage(config.num_hidden_layers)
        # by this name SGLang asks whether pictures are embedded here
        self.pp_group = stage
        self.is_sparse = any(config.sparse_layers[layer] for layer in stage.layers)
        # SGLang builds models under the device they will live on, and their dtype
        self.device_type = torch.get_default_device().type
        self.dtype = torch.get_default_dtype()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                prefix=f"{prefix}.embed_tokens",
                use_attn_tp_group=attends_apart(),
            )
        self.angles = RowAngles.of(config)
        self.sums = RankSums(hidden_size=config.hidden_size, device_type=self.device_type)
        rope = make_rope(config, device_type=self.device_type)
        # numbered as in the checkpoint, those of other stages too
        self.layers = nn.ModuleList(PPMissingLayer() for _ in range(config.num_hidden_layers))
        for index in stage.layers:
            layer = M3DecoderLayer(
                config,
                layer=index,
                rope=rope,
                sums=self.sums,
                device_type=self.device_type,
                quant_config=quant_config,
                prefix=f"{prefix}.layers.{index}",
            )
            if config.moe_layers[index]:
                # before the next layer takes as much memory again
                experts = layer.block_sparse_moe.experts
                share = rank_share(config.intermediate_size)
                require_expert_bytes(plan, experts, layer=f"model.layers.{index}", share=share)
            self.layers[index] = layer
        self.norm: nn.Module = PPMissingLayer()
        if stage.is_last_rank:
            self.norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # layers behind which an EAGLE3 head reads the stream
        self.captured_layers: tuple[int, ...] = ()

    @property
    def stage(self) -> PipelineStage:
        """What of the model is in this process."""
        return self.pp_group

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> PPProxyTensors | tuple[Tensor, list[Tensor] | None]:
        """Hidden states after the final norm, and the streams an EAGLE3 head has asked for.

        An earlier stage gives what the next one begins with, as `pp_proxy_tensors`: the stream, and
        what its last layer adds to it, summed over ranks.
        """
        if self.is_sparse:
            require_our_backend()
        hidden_states: Tensor
        residual: Tensor | None = None
        if pp_proxy_tensors is not None:
            hidden_states, residual = (pp_proxy_tensors.tensors[name] for name in _HANDED_ON)
        elif input_embeds is None:
            hidden_states = self.embed_tokens(input_ids)
        else:
            # a request's own come in bf16, whatever the model's dtype
            hidden_states = input_embeds.to(self.dtype)
        cos_sin = self.angles(positions)
        captured = []
        summed = residual is not None
        handed_on = None if self.stage.is_last_rank else self.stage.layers[-1]
        with activations_as_is(self.device_type):
            for layer in self.stage.layers:
                hidden_states, residual = self.layers[layer](
                    positions, cos_sin, hidden_states, residual, forward_batch, summed=summed
                )
                is_captured = layer in self.captured_layers
                summed = self.sums.are_whole
                if not summed and (is_captured or layer == handed_on):
                    hidden_states = self.sums.add_up(hidden_states)
                    summed = True
                if is_captured:
                    assert residual is not None
                    captured.append(hidden_states + residual)
        assert residual is not None
        if not self.stage.is_last_rank:
            return PPProxyTensors(dict(zip(_HANDED_ON, (hidden_states, residual), strict=True)))
        assert isinstance(self.norm, GemmaRMSNorm)
        if summed:
            hidden_states, _ = self.norm(hidden_states, residual)
        else:
            hidden_states, _ = self.sums.normalise(
                self.norm, hidden_states, residual, forward_batch
            )
        if self.is_sparse and not forward_batch.forward_mode.is_idle():
            check_result(hidden_states)
        return hidden_states, captured or None


class M3CausalLM(nn.Module):
    """Decoder stack and output head.

    Parameters
    ----------
    config : SGLang's config of the whole checkpoint or of its text part
    quant_config : SGLang's
    prefix : of the text model's names in the checkpoint, which quantisation refers to
    is_root : whether SGLang loads it by itself, not as part of a model with images
    """

    # SGLang's quantisation maps its fused names back to the checkpoint's through this
    packed_modules_mapping: ClassVar = {name: [*parts] for name, parts in FUSED_LAYERS.items()}

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        is_root: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        # trainers update a model that is loaded with some of its tensors at a time
        self.is_loaded = False
        self.m3_config = read_config(config)
        if self.m3_config.msa is None:
            logger.warning("m3-plugin: no layer of this checkpoint is sparse; MSA is not used")
        device_type = torch.get_default_device().type
        # SGLang makes a draft model after this one
        if get_spec().speculative_algorithm is not None:
            prepare_speculation(device_type=device_type)
        if is_disaggregated():
            prepare_transfers(device_type=device_type)
        if has_host_cache():
            prepare_host_cache(device_type=device_type)
        if attends_apart() and device_type == "cpu":
            exchange_rows()
        dot = f"{prefix}." if prefix else ""
        self.model = M3Model(
            self.m3_config,
            quant_config=quant_config,
            prefix=f"{dot}model",
            plan=read_plan(config.name_or_path, self.m3_config),
        )
        self.lm_head: nn.Module = PPMissingLayer()
        if self.model.stage.is_last_rank:
            self.lm_head = ParallelLMHead(
                self.m3_config.vocab_size,
                self.m3_config.hidden_size,
                quant_config=quant_config,
                prefix=f"{dot}lm_head",
            )
        routed = next((m for m in self.model.modules() if isinstance(m, M3MoE)), None)
        self.expert_proof = None if routed is None else ExpertProof(routed)
        self.logits_processor = LogitsProcessor(getattr(config, "text_config", config))
        use_own_products(self.model)
        if is_root:
            self.take_adapters(self, prefix="")
        # last: it looks at all others once they are loaded
        self.served = (
            ServedWeights(self, text=self.weight_loader, after_first=self.end_first_load)
            if is_root
            else None
        )

    def take_adapters(self, root: nn.Module, *, prefix: str) -> None:
        """With `--enable-lora`, say to SGLang which layers take adapters.

        Parameters
        ----------
        root : what SGLang serves
        prefix : of this model within it, with its dot
        """
        if takes_adapters():
            from m3_sglang.adapters import choose_adapted_layers

            choose_adapted_layers(root, self, self.m3_config, prefix=prefix)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> Any:
        given = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        return self.logits_of(given, input_ids, forward_batch)

    def logits_of(
        self,
        given: PPProxyTensors | tuple[Tensor, list[Tensor] | None],
        input_ids: Tensor,
        forward_batch: ForwardBatch,
    ) -> Any:
        """What SGLang expects of a step, from what the decoder stack gave."""
        if isinstance(given, PPProxyTensors):
            return given
        hidden_states, captured = given
        return self.logits_processor(
            input_ids, hidden_states, self.lm_head, forward_batch, captured
        )

    @property
    def start_layer(self) -> int:
        """First decoder layer of this stage; SGLang makes its caches from it."""
        return self.model.stage.layers.start

    @property
    def end_layer(self) -> int:
        """One past the last."""
        return self.model.stage.layers.stop

    def precompile_kernels_after_loading(self) -> None:
        """Called by SGLang before it records graphs."""
        self.model.sums.prepare()

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        """What a draft model shares with its target."""
        embedding, head = self.model.embed_tokens, self.lm_head
        return embedding.get_parameter("weight"), head.get_parameter("weight")

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        """Choose the layers whose output streams an EAGLE3 head reads.

        The default is that of SGLang's class for the released architecture; heads for M3 without
        `eagle_aux_hidden_state_layer_ids` in their config were trained on it.

        Raises
        ------
        ValueError : a layer the model does not have, or one given twice.
        """
        depth = self.m3_config.num_hidden_layers
        wanted = [2, depth // 2, depth - 3] if layer_ids is None else list(layer_ids)
        if len(set(wanted)) < len(wanted) or not all(0 <= layer < depth for layer in wanted):
            raise ValueError(
                "eagle_aux_hidden_state_layer_ids in the EAGLE3 head's config.json must be "
                f"different layers within 0..{depth - 1}; got {wanted}"
            )
        self.model.captured_layers = tuple(wanted)

    def weight_loader(self) -> WeightLoader:
        """A loader for the text model's tensors."""
        witness = None
        if self.expert_proof is not None and not self.is_loaded:
            stage, cut = self.model.stage, expert_cut()
            first = next(layer for layer in stage.layers if self.m3_config.moe_layers[layer])
            witness = ExpertWitness(
                self.m3_config,
                experts=f"model.layers.{first}.block_sparse_moe.experts",
                own=cut.own(self.m3_config.num_experts),
                rank=cut.rank,
                size=cut.ranks,
            )
        return text_weight_loader(
            self, config=self.m3_config, stage=self.model.stage, witness=witness
        )

    def end_first_load(self, loader: WeightLoader) -> None:
        """Give the proof of the experts what it compares the kernel with."""
        if self.expert_proof is not None and loader.witness is not None:
            self.expert_proof.known = loader.witness.testimony()
        self.is_loaded = True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        assert self.served is not None
        return self.served.load(weights)


def read_plan(name: str, config: M3Config, *, draft: bool = False) -> WeightPlan | None:
    """What every weight of the checkpoint becomes, logged; None if its files are not here yet.

    SGLang builds models under the dtype they will have.

    Parameters
    ----------
    name : folder, or id of a repository
    config : what it says of the weights (`m3_plugin.model.mtp.mtp_config` of a draft)
    draft : whether the MTP module is to be loaded
    """
    item_bytes = torch.get_default_dtype().itemsize
    plan = plan_before_loading(name, config, fused=FUSED, item_bytes=item_bytes, draft=draft)
    if plan is not None:
        logger.info("m3-plugin: %s", plan.describe())
    return plan


def rank_share(intermediate_size: int) -> float:
    """Part of a layer's routed experts that this rank holds, padding included."""
    cut = expert_cut()
    return expert_share(intermediate_size, ranks=cut.ranks) / cut.groups


def check_result(hidden_states: Tensor) -> None:
    """Under `M3_PLUGIN_CHECK`: refuse to serve what is not finite."""
    backend = get_attn_backend()
    if isinstance(backend, M3AttentionBackend) and backend.session.checker is not None:
        backend.session.checker.end(hidden_states)


def require_our_backend() -> None:
    """Refuse to run MSA layers on a backend that is not ours.

    Raises
    ------
    PluginRefusal : SGLang put its own backend around our model.
    """
    backend = get_attn_backend()
    if not isinstance(backend, M3AttentionBackend):
        raise PluginRefusal(
            f"SGLang runs m3-plugin's model on {type(backend).__name__}; start it with "
            "--attention-backend msa and without another plugin that replaces attention backends"
        )
