"""Dense MLP and routed experts of MiniMax-M3 from SGLang's layers, and the proof of their maths."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import (
    swiglu_no_interleaved_with_alpha_and_limit,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch import Tensor, nn

from m3_plugin.checkpoint.loading import interleave_gate_up, separate_gate_up
from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import ExpertProbe, KnownExperts
from m3_sglang.compat import expert_cut, expert_offset, is_capturing, second_stream
from m3_sglang.own_products import use_own_experts
from m3_sglang.quantization import Mxfp8ExpertsMethod
from m3_sglang.router import M3Router
from m3_sglang.stored_weights import StoredExpertsMethod

# SGLang's activations add a fixed 1 to `up`.
_HOST_BETA = 1.0


class M3MLP(nn.Module):
    """SwiGLU-OAI MLP of the dense layers and of the shared expert: [tokens, hidden] to same.

    What it returns is this rank's part, to be summed over ranks.
    """

    def __init__(
        self,
        config: M3Config,
        *,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
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
            reduce_results=False,
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
        self.gate = M3Router(config, device_type=device_type, prefix=f"{prefix}.gate")
        self.e_score_correction_bias: nn.Parameter | None = None
        if config.use_routing_bias:
            self.e_score_correction_bias = nn.Parameter(
                torch.empty(config.num_experts, dtype=torch.float32), requires_grad=False
            )
        # the shared expert reads what the routed ones, beside it on a stream of their own, would
        # write their sum into
        self.side_stream = second_stream(device_type) if config.num_shared_experts else None
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
            **expert_offset(FusedMoE, config.swiglu_beta),
            inplace=self.side_stream is None,
        )
        self.cut = expert_cut()
        elsewhere = device_type == "cpu" and self.cut.groups > 1
        # SGLang's plain torch experts know SwiGLU-OAI only with gate and up rows interleaved, and
        # say nothing when told that they are not: the rows are interleaved after loading.
        ours = (
            use_own_experts(self.experts, some_elsewhere=elsewhere)
            or isinstance(self.experts.quant_method, (Mxfp8ExpertsMethod, StoredExpertsMethod))
            or getattr(self.experts, "scheme", None) is not None
        )
        if elsewhere:
            # made by SGLang itself it would be on a device that it finds on no plain CPU
            dispatcher: Any = self.experts.dispatcher
            own = self.cut.own(config.num_experts)
            dispatcher.local_expert_mapping = numbers_here(config.num_experts, own)
        self.interleave = device_type == "cpu" and not ours
        self.is_interleaved = False
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
                prefix=f"{prefix}.shared_experts",
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, hidden] -> this rank's part of factor * routed + shared, to be summed."""
        if hidden_states.shape[0] == 0:
            return hidden_states
        if self.side_stream is not None and is_capturing():
            shared, routed = self._side_by_side(hidden_states, self.side_stream)
        else:
            # before the experts, which may work in place
            shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
            routed = self._routed(hidden_states)
        factor = self.config.routed_scaling_factor
        return routed * factor if shared is None else torch.add(shared, routed, alpha=factor)

    def _routed(self, hidden_states: Tensor) -> Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states, self.topk(hidden_states, router_logits))

    def _side_by_side(
        self, hidden_states: Tensor, side_stream: torch.cuda.Stream
    ) -> tuple[Tensor, Tensor]:
        """Shared and routed experts as two branches of a CUDA graph, as in SGLang's own M3.

        Eagerly the second stream would cost more time on the host than it saves on the device.
        """
        assert self.shared_experts is not None
        stream = torch.cuda.current_stream()
        side_stream.wait_stream(stream)
        shared = self.shared_experts(hidden_states)
        with torch.cuda.stream(side_stream):
            routed = self._routed(hidden_states)
        stream.wait_stream(side_stream)
        return shared, routed

    def start_loading(self) -> None:
        """Bring the experts' gate and up rows into the order of the checkpoint again."""
        if not self.is_interleaved:
            return
        weight = self.experts.get_parameter("w13_weight")
        weight.data = separate_gate_up(weight.data)
        self.is_interleaved = False

    def finish_loading(self) -> None:
        """Bring the experts' gate and up rows into the order the activation expects."""
        if not self.interleave:
            return
        weight = self.experts.get_parameter("w13_weight")
        weight.data = interleave_gate_up(weight.data)
        self.is_interleaved = True


def numbers_here(num_experts: int, own: range) -> Tensor:
    """Each expert's number on this rank, -1 for those of other ranks: int32 [experts].

    Parameters
    ----------
    own : the rank's experts
    """
    numbers = torch.full((num_experts,), -1, dtype=torch.int32)
    numbers[own.start : own.stop] = torch.arange(len(own), dtype=torch.int32)
    return numbers


class ExpertProof(nn.Module):
    """Refuses expert kernels that do not compute SwiGLU-OAI, once the weights are in place.

    SGLang has a dozen of them, and one that knows the activation only in another row order, or
    without the clamp, says nothing. So what the first MoE layer's experts make of tokens is worked
    out from the weights as the checkpoint has them, and compared with the kernels' answer: for one
    row and for many, for which SGLang may take another kernel or another layout. Without those
    weights (a dummy load) the clamp alone is proved.

    A module of its own, attached last: SGLang calls `quant_method.process_weights_after_loading`
    of each module in order, so this one runs when every kernel has its final weights.
    """

    def __init__(self, moe: M3MoE) -> None:
        super().__init__()
        # in a tuple so that the experts are not registered, and loaded, twice
        self._moe = (moe,)
        self.known: KnownExperts | None = None
        # SGLang builds a model under its activations' dtype
        self.dtype = torch.get_default_dtype()
        self.quant_method = _RunProof()

    def run(self) -> None:
        """Ask the kernels, in every layout that SGLang may choose.

        Raises
        ------
        ValueError : one of them answers wrongly.
        """
        probe = ExpertProbe(
            config=self._moe[0].config,
            host="SGLang",
            remedy="--moe-runner-backend",
            answer=self._answer,
            dtype=self.dtype,
        )
        for layout, chosen in expert_layouts(self._moe[0].experts):
            with chosen:
                probe.prove(self.known, layout=layout)
        # a proof is for the weights that are loaded first; updates keep their kernels
        self.known = None

    def _answer(self, tokens: Tensor) -> Tensor:
        """The mean of this rank's first experts as the kernel computes it, [rows, hidden]."""
        moe = self._moe[0]
        own = moe.cut.own(moe.config.num_experts)[: moe.config.num_experts_per_token]
        rows, count = len(tokens), len(own)
        device = next(moe.gate.parameters()).device
        tokens = tokens.to(dtype=self.dtype, device=device).contiguous()
        ids = torch.tensor(own, dtype=torch.int32, device=device).repeat(rows, 1)
        weights = torch.full_like(ids, 1 / count, dtype=torch.float32)
        logits = torch.zeros(rows, moe.config.num_experts, device=device)
        with activations_as_is(device.type):
            return moe.experts(tokens, StandardTopKOutput(weights, ids, logits))


def expert_layouts(experts: nn.Module) -> list[tuple[str, AbstractContextManager[Any]]]:
    """Layouts SGLang may choose between from call to call, each with what makes it choose that one.

    DeepGEMM's kernel takes rows padded per expert ("masked") where that fits into free memory, and
    "compact" ones elsewhere; the two have activations of their own.
    """
    runner = getattr(experts, "runner_backend", None)
    if runner is None or not runner.is_deep_gemm():
        return [("", nullcontext())]
    from sglang.srt.environ import envs

    setting = getattr(envs, "SGLANG_DEEPGEMM_STANDARD_LAYOUT", None)
    if setting is None or setting.get().lower() != "auto":
        return [("", nullcontext())]
    return [(layout, setting.override(layout)) for layout in ("masked", "compact")]


def activations_as_is(device_type: str) -> AbstractContextManager[None]:
    """SGLang's SwiGLU-OAI is under `torch.compile`, which on CPU only costs start-up time."""
    if device_type == "cpu":
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


class _RunProof:
    """Carries SGLang's after-loading call to the proof; owns no weights."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, ExpertProof)
        layer.run()

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        """Nothing to restore."""
