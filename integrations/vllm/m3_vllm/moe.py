"""Routed experts of MiniMax-M3 from vLLM's FusedMoE, and the proof that the clamp survived."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMulWithClamp
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from m3_plugin.checkpoint.loading import interleave_gate_up
from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import PROBE_ROWS, ExpertProbe
from m3_vllm.adapters import without_adapters
from m3_vllm.compat import device_type
from m3_vllm.local_experts import serve_local_experts

logger = init_logger("vllm.m3_plugin.moe")

# The constants vLLM's CPU expert kernel has compiled into its "swigluoai" activation.
_CPU_SWIGLU = (1.702, 7.0, 1.0)


class M3MLP(nn.Module):
    """SwiGLU-OAI MLP of the dense layers and of the shared expert: [tokens, hidden] to same."""

    def __init__(
        self,
        config: M3Config,
        *,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        reduce_results: bool,
        prefix: str,
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMulWithClamp(
            swiglu_limit=config.swiglu_limit, alpha=config.swiglu_alpha, beta=config.swiglu_beta
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class M3MoE(nn.Module):
    """Sigmoid-routed experts with a selection bias, plus the shared expert.

    Router weight, bias and logits are fp32 (they are stored so, and a bf16 router flips experts).
    """

    def __init__(
        self,
        config: M3Config,
        *,
        quant_config: QuantizationConfig | None,
        prefix: str,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        if get_tensor_model_parallel_world_size() > config.num_experts:
            raise ValueError(
                f"tensor parallel size must be at most num_local_experts={config.num_experts}; "
                f"got {get_tensor_model_parallel_world_size()}"
            )
        self.config = config
        self.on_cpu = device_type() == "cpu"
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        self.e_score_correction_bias: nn.Parameter | None = None
        if config.use_routing_bias:
            self.e_score_correction_bias = nn.Parameter(
                torch.empty(config.num_experts, dtype=torch.float32), requires_grad=False
            )
        self.shared_experts: M3MLP | None = None
        if config.num_shared_experts:
            self.shared_experts = M3MLP(
                config,
                intermediate_size=config.shared_intermediate_size * config.num_shared_experts,
                quant_config=quant_config,
                reduce_results=False,
                prefix=f"{prefix}.shared_experts",
            )
        if self.on_cpu:
            self._require_cpu_swiglu()
        # vLLM's CPU experts know only the activation that reads gate and up interleaved (so the
        # rows are interleaved before they are packed), and only its grouped router adds the
        # selection bias to sigmoid scores; one group holding every expert is plain top-k.
        routing = (
            {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
            if self.on_cpu
            else {}
        )
        with without_adapters():
            self.experts = FusedMoEFactory(
                num_experts=config.num_experts,
                top_k=config.num_experts_per_token,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                scoring_func="sigmoid",
                e_score_correction_bias=self.e_score_correction_bias,
                renormalize=True,
                routed_scaling_factor=config.routed_scaling_factor,
                activation="swigluoai" if self.on_cpu else "swigluoai_uninterleave",
                swiglu_limit=config.swiglu_limit,
                swiglu_alpha=config.swiglu_alpha,
                swiglu_beta=config.swiglu_beta,
                router_logits_dtype=torch.float32,
                shared_experts=self.shared_experts,
                quant_config=quant_config,
                reduce_results=reduce_results,
                prefix=f"{prefix}.experts",
                **routing,
            )
        if self.on_cpu and self.experts.moe_config.moe_parallel_config.use_ep:
            serve_local_experts(self.experts)
        elif self.on_cpu:
            pack_interleaved(self.experts)

    @property
    def partial(self) -> bool:
        """Whether the output is this rank's part; vLLM sums it all the same where it has to."""
        return self.experts.moe_config.skip_final_all_reduce

    @property
    def gathers_rows(self) -> bool:
        """Whether data parallel ranks hand all rows of a step to each other, however many.

        Other ways of vLLM's (DeepEP and the like) have limits of their own.
        """
        parallel = self.experts.moe_config.moe_parallel_config
        # on a CPU vLLM falls back to it
        gathering = self.on_cpu or parallel.use_ag_rs_all2all_kernels
        return gathering or not parallel.use_all2all_kernels

    def _require_cpu_swiglu(self) -> None:
        wanted = (self.config.swiglu_alpha, self.config.swiglu_limit, self.config.swiglu_beta)
        if wanted != _CPU_SWIGLU:
            raise ValueError(
                "config keys 'swiglu_alpha', 'swiglu_limit', 'swiglu_beta' must be "
                f"{_CPU_SWIGLU} on CPU (fixed in vLLM's expert kernel); got {wanted}"
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=router_logits)


def pack_interleaved(experts: nn.Module) -> None:
    """Have gate and up rows interleaved, as vLLM's CPU kernel reads them, before it packs them.

    vLLM processes an expert layer after its first load, and again whenever it was reloaded, at
    a moment of its own: the rows must change there and nowhere else. Reloaded experts it leaves
    unpacked; they are packed here (docs/vllm.md, repairs of host code).
    """
    for layer in experts.modules():
        # quantised rows belong to scales; vLLM has no CPU kernel for them that we know of
        weight = dict(layer.named_parameters(recurse=False)).get("w13_weight")
        if weight is not None and weight.dtype.itemsize > 1:
            _pack_interleaved(layer)


def _pack_interleaved(layer: Any) -> None:
    method = layer.quant_method
    process = method.process_weights_after_loading

    def process_interleaved(layer: Any) -> None:
        weight = layer.w13_weight
        weight.data = interleave_gate_up(weight.data)
        kernel = getattr(method, "moe_kernel", None)
        plain = weight.data[:1].clone()
        process(layer)
        left_plain = layer.w13_weight.shape[1:] == plain.shape[1:] and torch.equal(
            layer.w13_weight[:1], plain
        )
        if kernel is not None and left_plain:
            kernel.fused_experts.process_weights_after_loading(layer)

    method.process_weights_after_loading = process_interleaved


class ClampProbe(nn.Module):
    """Refuses an expert kernel that drops the SwiGLU clamp, once the weights are in place.

    Kernels have lost the clamp before (garbled output on quantised checkpoints), some for large
    batches alone. Rows at several magnitudes tell, whatever backend vLLM picked, however weights
    are quantised or sharded, and without a reference (`m3_plugin.model.experts.grows_unclamped`).

    Attached as the last module of the model: vLLM calls each module's
    `quant_method.process_weights_after_loading` in order, so this one runs after every expert
    kernel has its final weights.
    """

    def __init__(self, moe: M3MoE, *, vllm_config: VllmConfig) -> None:
        super().__init__()
        # in a tuple so that the experts are not registered, and loaded, twice
        self._moe = (moe,)
        self.vllm_config = vllm_config
        self.proved = False
        self.quant_method = _RunClampProbe()

    def run(self) -> None:
        """Probe the first MoE layer; all layers share one backend.

        Data parallel ranks compute experts together, so all of them must be here: they are when a
        server starts, and are not when weights change while it serves.

        Raises
        ------
        ValueError : the experts' output keeps growing with their input.
        """
        together = self.vllm_config.parallel_config.data_parallel_size > 1
        if together and (self.proved or not self._moe[0].gathers_rows):
            logger.info("clamp probe skipped: it would need every data parallel rank at once")
            return
        # vLLM runs no step of more rows
        largest = self.vllm_config.scheduler_config.max_num_batched_tokens
        ExpertProbe(
            config=self._moe[0].config,
            host="vLLM",
            remedy="--moe-backend",
            answer=self._answer,
            dtype=self.vllm_config.model_config.dtype,
            rows=tuple(dict.fromkeys(min(rows, largest) for rows in PROBE_ROWS)),
            in_step=together,
        ).prove(None)
        self.proved = True

    def _answer(self, rows: Tensor) -> Tensor:
        moe = self._moe[0]
        hidden = rows.to(dtype=self.vllm_config.model_config.dtype, device=device_type())
        hidden = hidden.contiguous()
        logits = torch.zeros(len(hidden), moe.config.num_experts, device=hidden.device)
        with set_forward_context(None, self.vllm_config, num_tokens=len(hidden)):
            output = moe.experts(hidden_states=hidden, router_logits=logits)
        return tensor_model_parallel_all_reduce(output) if moe.partial else output


class _RunClampProbe(QuantizeMethodBase):
    """Carries vLLM's after-loading call to the probe; owns no weights."""

    requires_device_loading = False
    supports_pre_processed_weights = True

    def create_weights(self, layer: nn.Module, *weight_args: object, **attrs: object) -> None:
        raise NotImplementedError("the clamp probe owns no weights")

    def apply(self, layer: nn.Module, *args: object, **kwargs: object) -> Tensor:
        raise NotImplementedError("the clamp probe is not part of the forward pass")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, ClampProbe)
        layer.run()
