"""Dense MLP and routed experts of MiniMax-M3 from SGLang's layers, and the proof of their maths."""

from __future__ import annotations

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import (
    swiglu_no_interleaved_with_alpha_and_limit,
)
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch import Tensor, nn

from m3_plugin.config import M3Config
from m3_sglang.compat import tensor_parallel_size

# SGLang's activations add a fixed 1 to `up`.
_HOST_BETA = 1.0


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
        self.alpha = config.swiglu_alpha
        self.limit = config.swiglu_limit
        if config.swiglu_beta != _HOST_BETA:
            raise ValueError(
                f"config key 'swiglu_beta' must be {_HOST_BETA} (fixed in SGLang's activations); "
                f"got {config.swiglu_beta}"
            )
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

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        activated = swiglu_no_interleaved_with_alpha_and_limit(gate_up, self.alpha, self.limit)
        output, _ = self.down_proj(activated)
        return output


class M3MoE(nn.Module):
    """Sigmoid-routed experts with a selection bias, plus the shared expert.

    Router weight, bias and logits are fp32 (they are stored so, and a bf16 router flips experts).
    """

    def __init__(
        self,
        config: M3Config,
        *,
        layer: int,
        device_type: str,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.config = config
        self.tp_size = tensor_parallel_size()
        # SGLang's plain torch experts know SwiGLU-OAI only with gate and up rows interleaved, and
        # say nothing when told that they are not: the rows are interleaved after loading.
        self.interleave = device_type == "cpu"
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=f"{prefix}.gate",
        )
        self.e_score_correction_bias: nn.Parameter | None = None
        if config.use_routing_bias:
            self.e_score_correction_bias = nn.Parameter(
                torch.empty(config.num_experts, dtype=torch.float32), requires_grad=False
            )
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_token,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layer_id=layer,
            quant_config=quant_config,
            activation="silu",
            is_gated=True,
            gemm1_alpha=config.swiglu_alpha,
            gemm1_clamp_limit=config.swiglu_limit,
            gate_up_interleaved=False,
            prefix=f"{prefix}.experts",
        )
        self.topk = TopK(
            top_k=config.num_experts_per_token,
            renormalize=True,
            layer_id=layer,
            scoring_func="sigmoid",
            correction_bias=self.e_score_correction_bias,
        )
        if hasattr(self.topk, "bind_runner_backend"):
            self.topk.bind_runner_backend(self.experts.runner_backend)
        self.shared_experts: M3MLP | None = None
        if config.num_shared_experts:
            self.shared_experts = M3MLP(
                config,
                intermediate_size=config.shared_intermediate_size * config.num_shared_experts,
                quant_config=quant_config,
                reduce_results=False,
                prefix=f"{prefix}.shared_experts",
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, hidden] -> same: factor * routed + shared, one all-reduce for both."""
        if hidden_states.shape[0] == 0:
            return hidden_states
        # before the experts, which may work in place
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        router_logits, _ = self.gate(hidden_states.float())
        routed = self.experts(hidden_states, self.topk(hidden_states, router_logits))
        factor = self.config.routed_scaling_factor
        total = routed * factor if shared is None else torch.add(shared, routed, alpha=factor)
        return tensor_model_parallel_all_reduce(total) if self.tp_size > 1 else total

    def finish_loading(self) -> None:
        """Bring the experts' gate and up rows into the order the activation expects."""
        if not self.interleave:
            return
        weight = self.experts.w13_weight
        weight.data = interleave_gate_up(weight.data)


def interleave_gate_up(w13: Tensor) -> Tensor:
    """[experts, gates | ups, hidden] -> [experts, gate 0, up 0, gate 1, ..., hidden]."""
    experts, rows, hidden = w13.shape
    halves = w13.view(experts, 2, rows // 2, hidden)
    return halves.transpose(1, 2).reshape(experts, rows, hidden).contiguous()
