"""Dense MLP and routed experts of MiniMax-M3 from SGLang's layers, and the proof of their maths."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch import Tensor, nn

from m3_plugin.checkpoint.loading import interleave_gate_up, separate_gate_up
from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import (
    PROBE_MAGNITUDES,
    PROOF_TOLERANCE,
    probe_token,
    require_clamped,
    routed_output,
)
from m3_sglang.compat import tensor_parallel_size
from m3_sglang.quantization import Mxfp8ExpertsMethod

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
        self.proof: ExpertProof | None = None
        self.tp_size = tensor_parallel_size()
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
        # SGLang's plain torch experts know SwiGLU-OAI only with gate and up rows interleaved, and
        # say nothing when told that they are not: the rows are interleaved after loading.
        ours = isinstance(self.experts.quant_method, Mxfp8ExpertsMethod)
        self.interleave = device_type == "cpu" and not ours
        self.interleaved = False
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
        if self.proof is not None:
            self.proof.expect(self.experts)
        if not self.interleave:
            return
        weight = self.experts.get_parameter("w13_weight")
        weight.data.copy_(interleave_gate_up(weight.data))
        self.interleaved = True

    def reopen_loading(self) -> None:
        """Bring the rows back into the checkpoint's order, for a load into some of them."""
        if self.interleaved:
            weight = self.experts.get_parameter("w13_weight")
            weight.data.copy_(separate_gate_up(weight.data))
            self.interleaved = False


class ExpertProof(nn.Module):
    """Refuses an expert kernel that does not compute SwiGLU-OAI, once the weights are in place.

    SGLang has a dozen of them, and one that knows the activation only in another row order, or
    without the clamp, says nothing. So what the first MoE layer's experts make of a token is
    worked out from the weights as they were loaded, and compared with what the kernel makes of it.

    Experts stored quantised mean nothing without their scales; for them only the clamp is proved,
    by how the output grows with the input.

    A module of its own, attached last: SGLang calls `quant_method.process_weights_after_loading`
    of each module in order, so this one runs when every kernel has its final weights.
    """

    def __init__(self, moe: M3MoE) -> None:
        super().__init__()
        # in a tuple so that the experts are not registered, and loaded, twice
        self._moe = (moe,)
        self.expected: Tensor | None = None
        # SGLang builds a model under its activations' dtype
        self.dtype = torch.get_default_dtype()
        self.quant_method = _RunProof()
        moe.proof = self

    def expect(self, experts: nn.Module) -> None:
        """Work out the answer from weights in the checkpoint's row order."""
        weights = dict(experts.named_parameters(recurse=False))
        if "w13_weight" not in weights:
            return
        w13, w2 = weights["w13_weight"], weights["w2_weight"]
        if not (w13.dtype.is_floating_point and w13.dtype.itemsize >= 2):
            return
        # rounded as the kernel will receive it
        token = self._token().to(dtype=self.dtype, device=w13.device)
        self.expected = routed_output(token, w13, w2, self._moe[0].config)

    def run(self) -> None:
        """Compare the kernel's answer with the expected one.

        Raises
        ------
        ValueError : they differ by more than rounding in the weights' dtype explains.
        """
        config = self._moe[0].config
        if self.expected is None:
            norms = [
                float(self._answer(probe_token(config, magnitude=size)).norm())
                for size in PROBE_MAGNITUDES
            ]
            require_clamped(norms, config=config, host="SGLang", remedy="--moe-runner-backend")
            return
        error = float((self._answer(self._token()) - self.expected).norm() / self.expected.norm())
        self.expected = None
        if not error <= PROOF_TOLERANCE:
            raise ValueError(
                "SGLang's expert kernel does not compute MiniMax-M3's SwiGLU-OAI "
                f"(relative error {error:.3g} on one token, at most {PROOF_TOLERANCE} is "
                "rounding); choose another one with --moe-runner-backend"
            )

    def _token(self) -> Tensor:
        """[1, hidden]: large enough for gates and ups of either sign to meet the clamp."""
        return probe_token(self._moe[0].config, magnitude=4.0)

    def _answer(self, token: Tensor) -> Tensor:
        """The mean of the first experts as the kernel computes it, fp32 [1, hidden]."""
        moe = self._moe[0]
        count = moe.config.num_experts_per_token
        device = next(moe.gate.parameters()).device
        token = token.to(dtype=self.dtype, device=device)
        ids = torch.arange(count, dtype=torch.int32, device=device)[None]
        weights = torch.full_like(ids, 1 / count, dtype=torch.float32)
        logits = torch.zeros(1, moe.config.num_experts, device=device)
        with activations_as_is(device.type):
            return moe.experts(token, StandardTopKOutput(weights, ids, logits)).float()


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
