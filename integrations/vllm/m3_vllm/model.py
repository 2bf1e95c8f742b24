"""MiniMax-M3 for vLLM, built from vLLM's public layers around our MSA attention.

Text part: `M3ForCausalLM`. With images and video: `M3ForConditionalGeneration`, which adds the
vision tower and hands its embeddings to the same text part.
"""

# No `from __future__ import annotations` here: torch.compile support reads the annotations of
# `M3Model.forward` to find its dynamic dimensions and does not understand strings.

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    MinimaxM3QKVParallelLinearWithIndexer,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    spec_decode_needs_target_embed,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from m3_kernels.norm_rope_store import HeadNorms
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.sharing import index_heads_of_rank
from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.checkpoint.loading import (
    WeightLoader,
    expert_share,
    plan_before_loading,
    require_expert_bytes,
)
from m3_plugin.checkpoint.names import is_mtp_tensor
from m3_plugin.checkpoint.plan import WeightPlan
from m3_plugin.host.presence import attestation
from m3_plugin.model.config import M3Config, local_heads
from m3_plugin.model.rope import ComputedRope, RowAngles
from m3_plugin.model.vision import M3Vision, VisionConfig
from m3_vllm.adapters import choose_adapted_layers, takes_adapters
from m3_vllm.backend import dense_backend
from m3_vllm.caches import M3SparseCacheLayer
from m3_vllm.compat import device_type, vllm_version
from m3_vllm.media import (
    M3DummyInputsBuilder,
    M3MultiModalMixin,
    M3MultiModalProcessor,
    M3ProcessingInfo,
    pixel_scale,
    vision_ranks,
)
from m3_vllm.moe import M3MLP, ClampProbe, M3MoE
from m3_vllm.norms import HiddenNorm, add_and_norm, norm_and_rotate
from m3_vllm.own_products import use_own_products
from m3_vllm.session import worker_session
from m3_vllm.speculation import prepare_speculation, require_aux_layers
from m3_vllm.updates import ServedWeights
from m3_vllm.weights import fused_projections, text_weight_loader, unread_experts

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager

logger = init_logger("vllm.m3_plugin.model")


def read_config(vllm_config: VllmConfig) -> M3Config:
    """The model's config as vLLM parsed it, checked for what a paged host can serve."""
    config = M3Config.from_hf(vllm_config.model_config.hf_config.to_dict())
    config.require_paged_host()
    return config


def read_plan(
    vllm_config: VllmConfig, model_config: ModelConfig, config: M3Config, *, draft: bool = False
) -> WeightPlan | None:
    """What every weight of the checkpoint becomes, logged; None if its files are not here yet.

    Parameters
    ----------
    vllm_config : says how to load
    model_config : of the target, or of the draft
    config : what it says of the weights (`m3_plugin.model.mtp.mtp_config` of a draft)
    draft : whether MTP modules are to be loaded
    """
    if vllm_config.load_config.load_format == "dummy":
        return None
    plan = plan_before_loading(
        model_config.model,
        config,
        fused=fused_projections(config, draft=draft, adapted=takes_adapters(vllm_config)),
        item_bytes=model_config.dtype.itemsize,
        draft=draft,
    )
    if plan is not None:
        logger.info("m3-plugin: %s", plan.describe())
    return plan


class _M3AttentionBase(nn.Module):
    """Output projection and per-head Gemma QK norms, common to both kinds of layer."""

    def __init__(self, config: M3Config, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = local_heads(config.num_attention_heads, tp_size)
        self.total_kv_heads = config.num_key_value_heads
        self.num_kv_heads = local_heads(config.num_key_value_heads, tp_size)
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            # each rank's part; `M3DecoderLayer` sums them where it normalises
            reduce_results=False,
            prefix=f"{prefix}.o_proj",
        )
        self.eps = config.rms_norm_eps
        self.q_norm = HiddenNorm(self.head_dim, eps=self.eps)
        self.k_norm = HiddenNorm(self.head_dim, eps=self.eps)


def dense_rope(config: M3Config, *, max_model_len: int, device_type: str) -> nn.Module:
    """vLLM's RoPE, with a table for every position that a request can have; on CPUs without one.

    `VLLM_ALLOW_LONG_MAX_MODEL_LEN` admits more of them than the config names; sparse layers compute
    their angles from positions and need no table.
    """
    if device_type == "cpu":
        return ComputedRope.of(config)
    return get_rope(
        config.head_dim,
        max_position=max(config.max_position_embeddings, max_model_len),
        rope_parameters={
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
    )


class M3DenseAttention(_M3AttentionBase):
    """Causal GQA over the whole context (the first layers), by what `dense_backend` chooses."""

    def __init__(self, config: M3Config, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, vllm_config=vllm_config, prefix=prefix)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            attn_backend=dense_backend(vllm_config, head_dim=self.head_dim),
            prefix=f"{prefix}.attn",
        )
        self.rotary_emb = dense_rope(
            config,
            max_model_len=vllm_config.model_config.max_model_len,
            device_type=device_type(),
        )

    def forward(self, positions: Tensor, cos_sin: Tensor, hidden_states: Tensor) -> Tensor:
        # called as MSA layers are; RoPE of dense layers takes positions and leaves cos_sin alone
        qkv, _ = self.qkv_proj(hidden_states)
        done = norm_and_rotate(
            qkv,
            positions,
            norms=(self.q_norm, self.k_norm),
            rope=self.rotary_emb,
            heads=(self.num_heads, self.num_kv_heads),
        )
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if not done:
            q, k = self.norm_and_rope(positions, q, k)
        attended = self.attn(q.flatten(1), k.flatten(1), v)
        output, _ = self.o_proj(attended)
        return output

    def norm_and_rope(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise each head, then rotate its first `rotary_dim` channels.

        Parameters
        ----------
        q, k : [tokens, heads * head_dim]; returned as [tokens, heads, head_dim]
        """
        tokens = q.shape[0]
        q = self.q_norm(q.reshape(tokens, -1, self.head_dim)).view(tokens, -1)
        k = self.k_norm(k.reshape(tokens, -1, self.head_dim)).view(tokens, -1)
        q, k = self.rotary_emb(positions, q, k)
        return q.view(tokens, -1, self.head_dim), k.view(tokens, -1, self.head_dim)


class M3SparseAttention(_M3AttentionBase):
    """MSA: index branch and main branch from one projection, attention over chosen blocks only.

    Norm modules own the weights of their norms; the session applies them, with RoPE, where it
    stores keys.

    A checkpoint that stores the index branch otherwise than q, k and v (usually unquantised beside
    quantised) gets two projections: one fused layer has one quantisation method. So does a server
    that takes LoRA adapters: vLLM adapts q, k and v together, but not with an index branch.
    Ranks that share scans take all index heads of the second, others their own.
    """

    def __init__(
        self, config: M3Config, *, session: MSASession, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__(config, vllm_config=vllm_config, prefix=prefix)
        msa = session.msa
        if msa.index_dim != config.head_dim:
            raise ValueError(
                "config key 'sparse_attention_config.sparse_index_dim' must equal "
                f"head_dim={config.head_dim} in vLLM's fused projection; got {msa.index_dim}"
            )
        self.index_proj: nn.Module | None = None
        fused = fused_projections(
            config, draft=is_mtp_tensor(prefix), adapted=takes_adapters(vllm_config)
        )
        if fused["index_q_proj"][0] == "qkv_proj":
            # [q | k | v | index_q | index_k]; index_q is split and replicated like the KV heads,
            # the single index_k head is on every rank
            self.qkv_proj = MinimaxM3QKVParallelLinearWithIndexer(
                config.hidden_size,
                config.head_dim,
                config.num_attention_heads,
                config.num_key_value_heads,
                msa.num_index_heads,
                msa.index_dim,
                bias=False,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
        else:
            self.qkv_proj = QKVParallelLinear(
                config.hidden_size,
                config.head_dim,
                config.num_attention_heads,
                config.num_key_value_heads,
                bias=False,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
            # Small enough to be whole on every rank, which then takes its own heads. Its name must
            # not end in "qkv_proj": vLLM's auto-round looks for fused names within names.
            self.index_proj = MergedColumnParallelLinear(
                config.hidden_size,
                [msa.num_index_heads * msa.index_dim, msa.index_dim],
                bias=False,
                quant_config=vllm_config.quant_config,
                disable_tp=True,
                prefix=f"{prefix}.index_proj",
            )
        self.index_q_norm = HiddenNorm(msa.index_dim, eps=self.eps)
        self.index_k_norm = HiddenNorm(msa.index_dim, eps=self.eps)
        heads = index_heads_of_rank(
            msa.num_index_heads,
            rank=get_tensor_model_parallel_rank(),
            ranks=get_tensor_model_parallel_world_size(),
        )
        if session.sharing is not None:
            heads = slice(0, msa.num_index_heads)
        self.num_index_heads = heads.stop - heads.start
        self.first_index_channel = heads.start * msa.index_dim
        self.main_split_sizes = [self.q_size, self.kv_size, self.kv_size]
        self.index_split_sizes = [self.num_index_heads * msa.index_dim, msa.index_dim]
        self.has_scales = False
        self.attn = M3SparseCacheLayer(
            session=session,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            prefix=f"{prefix}.attn",
        )

    def take_cache_scales(self, scales: CacheScales) -> None:
        """Keep this rank's part of the layer's scales for an fp8 cache."""
        own = scales.of_rank(
            num_kv_heads=self.total_kv_heads,
            rank=get_tensor_model_parallel_rank(),
            size=get_tensor_model_parallel_world_size(),
            device=self.q_norm.get_parameter("weight").device,
        )
        if self.has_scales:
            own = own.in_place_of(self.attn.scales, layer=self.attn.layer_name)
        self.attn.set_scales(own)
        self.has_scales = True

    def head_norms(self) -> HeadNorms:
        """The norms of q, k, index q and index k."""
        return HeadNorms(
            q=self.q_norm.weight,
            k=self.k_norm.weight,
            index_q=self.index_q_norm.weight,
            index_k=self.index_k_norm.weight,
            eps=self.eps,
        )

    def forward(self, positions: Tensor, cos_sin: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        if self.index_proj is None:
            sizes = self.main_split_sizes + self.index_split_sizes
            q, k, v, index_q, index_k = qkv.split(sizes, dim=-1)
        else:
            q, k, v = qkv.split(self.main_split_sizes, dim=-1)
            index, _ = self.index_proj(hidden_states)
            width, key_width = self.index_split_sizes
            index_q = index.narrow(-1, self.first_index_channel, width)
            index_k = index[..., -key_width:]
        attended = self.attn(
            q.unflatten(-1, (-1, self.head_dim)),
            k.unflatten(-1, (-1, self.head_dim)),
            v.unflatten(-1, (-1, self.head_dim)),
            index_q.unflatten(-1, (self.num_index_heads, -1)),
            index_k,
            norms=self.head_norms(),
            cos_sin=cos_sin,
        )
        output, _ = self.o_proj(attended.flatten(1))
        return output


class M3DecoderLayer(nn.Module):
    """Pre-norm layer: attention (dense or MSA), then MLP (dense or routed).

    Parameters
    ----------
    layer : which of the config's layers this is
    session : runs the MSA layers of this worker; None if the model has none
    prefix : the layer's name in the checkpoint
    reduces : whether what the layer adds is summed over ranks; if not, `partial` says that whoever
        reads it has to, which one kernel does together with the next norm
    """

    def __init__(
        self,
        config: M3Config,
        *,
        layer: int,
        session: MSASession | None,
        vllm_config: VllmConfig,
        prefix: str,
        reduces: bool = True,
    ) -> None:
        super().__init__()
        if config.sparse_layers[layer]:
            assert session is not None
            self.self_attn: nn.Module = M3SparseAttention(
                config, session=session, vllm_config=vllm_config, prefix=f"{prefix}.self_attn"
            )
        else:
            self.self_attn = M3DenseAttention(
                config, vllm_config=vllm_config, prefix=f"{prefix}.self_attn"
            )
        # the attribute carries the checkpoint's name, which quantisation ignore-lists refer to
        self.feed_forward_name = "block_sparse_moe" if config.moe_layers[layer] else "mlp"
        feed_forward_prefix = f"{prefix}.{self.feed_forward_name}"
        if config.moe_layers[layer]:
            self.block_sparse_moe = M3MoE(
                config,
                quant_config=vllm_config.quant_config,
                reduce_results=reduces,
                prefix=feed_forward_prefix,
            )
            self.partial = self.block_sparse_moe.partial
        else:
            self.mlp = M3MLP(
                config,
                intermediate_size=config.dense_intermediate_size,
                quant_config=vllm_config.quant_config,
                reduce_results=reduces,
                prefix=feed_forward_prefix,
            )
            self.partial = not reduces
        self.input_layernorm = HiddenNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HiddenNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: Tensor,
        cos_sin: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        *,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> what the layer adds to the stream, and the stream before that.

        Parameters
        ----------
        cos_sin : of the positions (`RowAngles`), for an MSA layer
        partial : whether `hidden_states` are this rank's part of what the layer before adds
        """
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = add_and_norm(
                hidden_states, residual, self.input_layernorm, partial=partial
            )
        hidden_states = self.self_attn(positions, cos_sin, hidden_states)
        hidden_states, residual = add_and_norm(
            hidden_states, residual, self.post_attention_layernorm, partial=True
        )
        feed_forward = getattr(self, self.feed_forward_name)
        return feed_forward(hidden_states), residual


def require_planned(
    layer: M3DecoderLayer, plan: WeightPlan | None, *, vllm_config: VllmConfig, name: str
) -> None:
    """Measure a layer's routed experts against the plan before the next one takes memory too.

    Parameters
    ----------
    layer : just built, with routed experts
    name : of the layer in the checkpoint

    Raises
    ------
    ValueError : see `require_expert_bytes`.
    """
    parallel = vllm_config.parallel_config
    # redundant experts of a load balancer are no part of the files
    if not parallel.enable_eplb:
        share = expert_share(
            layer.block_sparse_moe.config.intermediate_size,
            ranks=parallel.tensor_parallel_size * parallel.data_parallel_size,
        )
        experts = layer.block_sparse_moe.experts
        require_expert_bytes(plan, experts, layer=name, share=share)


@support_torch_compile
class M3Model(nn.Module, EagleModelMixin):
    """Embedding, decoder layers of this pipeline stage, final norm.

    With an EAGLE3 head, `forward` also returns the streams the head reads: in front of layer i for
    each i vLLM has asked for, those of earlier stages first.
    """

    supports_aux_hidden_states_over_pp = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = read_config(vllm_config)
        self.m3_config = config
        # vLLM reads hidden_size of it where streams of an EAGLE3 head cross pipeline stages
        self.config = vllm_config.model_config.hf_text_config
        plan = read_plan(vllm_config, vllm_config.model_config, config)
        self.session = worker_session(config, vllm_config)
        # on the last stage a draft model may share it
        self.has_embedding = get_pp_group().is_first_rank or spec_decode_needs_target_embed(
            vllm_config, include_mtp=vllm_config.use_v2_model_runner
        )
        if self.has_embedding:
            self.embed_tokens: nn.Module = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: self._build_layer(vllm_config, prefix=prefix, plan=plan),
            prefix=f"{prefix}.layers",
        )
        self.angles = RowAngles.of(config)
        if get_pp_group().is_last_rank:
            self.norm: nn.Module = HiddenNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            self.norm = PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def _build_layer(
        self, vllm_config: VllmConfig, *, prefix: str, plan: WeightPlan | None
    ) -> M3DecoderLayer:
        """One decoder layer, measured against the plan."""
        index = int(prefix.rpartition(".")[2])
        layer = M3DecoderLayer(
            self.m3_config,
            layer=index,
            session=self.session,
            vllm_config=vllm_config,
            prefix=prefix,
            # what crosses to another pipeline stage is whole
            reduces=get_pp_group().world_size > 1,
        )
        if self.m3_config.moe_layers[index]:
            require_planned(layer, plan, vllm_config=vllm_config, name=f"model.layers.{index}")
        return layer

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        streams = self.collect_remote_aux_hidden_states(intermediate_tensors)
        local: list[torch.Tensor] = []
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden_states = inputs_embeds
            residual = None
            if self.start_layer in self.aux_hidden_state_layers:
                # the first norm may add to the embedding in place
                local.append(hidden_states.clone())
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors.tensors["hidden_states"]
            residual = intermediate_tensors.tensors["residual"]
        cos_sin = self.angles(positions)
        partial = False
        for index in range(self.start_layer, self.end_layer):
            layer = self.layers[index]
            hidden_states, residual = layer(
                positions, cos_sin, hidden_states, residual, partial=partial
            )
            partial = bool(layer.partial)
            if partial and index + 1 in self.aux_hidden_state_layers:
                # an EAGLE3 head reads the whole stream, not this rank's part
                hidden_states = tensor_model_parallel_all_reduce(hidden_states)
                partial = False
            self._maybe_add_hidden_state(local, index + 1, hidden_states, residual)
        assert residual is not None
        if not get_pp_group().is_last_rank:
            passed_on = {"hidden_states": hidden_states, "residual": residual}
            return IntermediateTensors(passed_on | self.pack_local_aux_hidden_states(local))
        hidden_states, _ = add_and_norm(hidden_states, residual, self.norm, partial=partial)
        streams += local
        return (hidden_states, streams) if streams else hidden_states


class M3ForCausalLM(nn.Module, SupportsPP, SupportsEagle3, SupportsLoRA):
    """Text model: decoder stack and output head.

    Parameters
    ----------
    is_root : whether vLLM loads it by itself, not as part of a model with images
    """

    # set by vLLM once it has put its LoRA layers around ours
    lora_manager: "LoRAModelManager | None" = None
    # vLLM's quantisation maps its fused names back to the checkpoint's through this
    packed_modules_mapping: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "index_proj": ["index_q_proj", "index_k_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", is_root: bool = True) -> None:
        super().__init__()
        prepare_speculation(vllm_config)
        self.adapted = takes_adapters(vllm_config)
        self.config = vllm_config.model_config.hf_text_config
        self.parallel_config = vllm_config.parallel_config
        self.model = M3Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        config = self.model.m3_config
        if get_pp_group().is_last_rank:
            self.lm_head: nn.Module = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # the name under which vLLM asks a model to translate an adapter's names
        self.hf_to_vllm_mapper = choose_adapted_layers(
            vllm_config, config, prefix=f"{prefix}." if prefix else ""
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        moe_layers = [module for module in self.model.modules() if isinstance(module, M3MoE)]
        if moe_layers:
            self.clamp_probe = ClampProbe(moe_layers[0], vllm_config=vllm_config)
        use_own_products(self)
        # last: it looks at all others once they are loaded
        self.served: ServedWeights | None = None
        if is_root:
            self.served = ServedWeights(
                self, text=self.weight_loader, model_config=vllm_config.model_config
            )
        self._attest()

    def _attest(self) -> None:
        session = self.model.session
        if session is None:
            logger.warning("m3-plugin: no layer of this checkpoint is sparse; MSA is not used")
            return
        stage = range(self.model.start_layer, self.model.end_layer)
        sparse = sum(self.model.m3_config.sparse_layers[layer] for layer in stage)
        logger.info(
            "%s",
            attestation(
                host="vLLM",
                host_version=vllm_version(),
                kernels=session.kernels.describe(),
                detail=f"serving MiniMax-M3 with {sparse} MSA and {len(stage) - sparse} dense "
                f"attention layers in this process{self._dense_kernel()}",
            ),
        )

    def _dense_kernel(self) -> str:
        dense = (m for m in self.model.modules() if isinstance(m, M3DenseAttention))
        first = next(dense, None)
        return "" if first is None else f", dense ones on {first.attn.attn_backend.__name__}"

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors | tuple[Tensor, list[Tensor]]:
        given = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        session = self.model.session
        if session is not None and session.checker is not None:
            hidden = given[0] if isinstance(given, tuple) else given
            # other stages hand on what the last one looks at
            if isinstance(hidden, Tensor):
                session.checker.end(hidden)
        return given

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """Choose the streams an EAGLE3 head reads; i means in front of layer i."""
        require_aux_layers(layers, num_layers=self.model.m3_config.num_hidden_layers)
        super().set_aux_hidden_state_layers(layers)

    def weight_loader(self) -> WeightLoader:
        """A loader for this stage's tensors."""
        return text_weight_loader(
            self,
            config=self.model.m3_config,
            layers=range(self.model.start_layer, self.model.end_layer),
            embedding=self.model.has_embedding,
            last_stage=get_pp_group().is_last_rank,
            unread=unread_experts(self.model.m3_config, self.parallel_config),
            adapted=self.adapted,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        assert self.served is not None
        return self.served.load(weights)


@MULTIMODAL_REGISTRY.register_processor(
    M3MultiModalProcessor, info=M3ProcessingInfo, dummy_inputs=M3DummyInputsBuilder
)
class M3ForConditionalGeneration(
    nn.Module, M3MultiModalMixin, SupportsPP, SupportsEagle3, SupportsLoRA
):
    """The released model: vision tower and projector in front of the text model."""

    lora_manager: "LoRAModelManager | None" = None
    packed_modules_mapping = M3ForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision_tower = M3Vision(
                VisionConfig.from_hf(self.config), scale=pixel_scale(vllm_config.model_config)
            )
        self.vision_ranks = vision_ranks(vllm_config)
        with self._mark_language_model(vllm_config):
            self.language_model = M3ForCausalLM(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                is_root=False,
            )
        self.hf_to_vllm_mapper = self.language_model.hf_to_vllm_mapper
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.served = ServedWeights(
            self,
            text=self.language_model.weight_loader,
            tower=self.vision_tower,
            model_config=vllm_config.model_config,
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors | tuple[Tensor, list[Tensor]]:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """Choose the streams an EAGLE3 head reads; i means in front of layer i."""
        self.language_model.set_aux_hidden_state_layers(layers)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return self.served.load(weights)
