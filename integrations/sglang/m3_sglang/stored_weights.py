"""Quantised M3 checkpoints in SGLang on a CPU: weights stay in the bytes they are stored in.

SGLang has no CPU kernels for most of the formats. Ours (`m3_kernels.quantised_linear`,
`quantised_experts`) decode within the product; our loader brings every format into one layout.
MXFP8 throughout keeps `m3_sglang.quantization`, whose products run on the same kernels there.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import set_weight_attrs
from torch import Tensor, nn

from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.quantised_linear import quantised_linear
from m3_plugin.checkpoint.stored_layers import (
    StoredWeight,
    stored_layout,
    stored_parameters,
    write_expert,
)
from m3_plugin.quantization.dialects import Quantization, read_quantization
from m3_plugin.quantization.packing import Layout
from m3_sglang.compat import stored_quantization
from m3_sglang.ours import STORED_METHOD
from m3_sglang.weights import FUSED

# SGLang's experts add a fixed 1 to `up`.
_BETA = 1.0


class M3StoredConfig(QuantizationConfig):
    """Each layer by the format of its weights, or plain.

    Parameters
    ----------
    quantization : what the checkpoint's config.json says
    """

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def get_name(self) -> str:
        return STORED_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> M3StoredConfig:
        quantization = read_quantization(stored_quantization(config))
        assert quantization is not None
        return cls(quantization)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, FusedMoE):
            layout = stored_layout(self.quantization, f"{prefix}.0.w1", fused={})
            return None if layout is None else StoredExpertsMethod(layout)
        if isinstance(layer, LinearBase):
            fused = {projection: fused for projection, (fused, _) in FUSED.items()}
            layout = stored_layout(self.quantization, prefix, fused=fused)
            return UnquantizedLinearMethod() if layout is None else StoredLinearMethod(layout)
        return None

    def get_scaled_act_names(self) -> list[str]:
        return []


class StoredLinearMethod(LinearMethodBase):
    """A linear layer whose parameters are the parts of a `StoredMatrix`."""

    def __init__(self, layout: Layout) -> None:
        self.weight = StoredWeight(layout)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows = (sum(output_partition_sizes),)
        parts = stored_parameters(self.weight.layout, rows, input_size_per_partition)
        for name, parameter in parts.items():
            set_weight_attrs(parameter, extra_weight_attrs)
            layer.register_parameter(name, parameter)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = quantised_linear(x.reshape(-1, x.shape[-1]), self.weight.of(layer))
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class StoredExpertsMethod(FusedMoEMethodBase):
    """Routed experts whose parameters are the parts of two `StoredMatrix`, w13 and w2."""

    def __init__(self, layout: Layout) -> None:
        self.w13 = StoredWeight(layout, prefix="w13_")
        self.w2 = StoredWeight(layout, prefix="w2_")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        def load(
            parameter: nn.Parameter, tensor: Tensor, name: str, *, shard_id: str, expert_id: int
        ) -> None:
            first = layer.moe_ep_rank * layer.num_local_experts
            if 0 <= expert_id - first < layer.num_local_experts:
                write_expert(
                    parameter,
                    tensor,
                    matrix=shard_id,
                    expert=expert_id - first,
                    rank=layer.moe_tp_rank,
                )

        sizes = {
            self.w13: ((num_experts, 2 * intermediate_size_per_partition), hidden_size),
            self.w2: ((num_experts, hidden_size), intermediate_size_per_partition),
        }
        for weight, (rows, columns) in sizes.items():
            for name, parameter in stored_parameters(weight.layout, rows, columns).items():
                set_weight_attrs(parameter, extra_weight_attrs | {"weight_loader": load})
                layer.register_parameter(f"{weight.prefix}{name}", parameter)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """Nothing of SGLang's runs: `apply` is the whole of it."""

    def apply(self, layer: nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """The weighted sum of each token's experts."""
        chosen = dispatch_output.topk_output
        rules: Any = layer.moe_runner_config
        total = quantised_experts(
            dispatch_output.hidden_states,
            self.w13.of(layer),
            self.w2.of(layer),
            expert_ids=chosen.topk_ids.int(),
            expert_weights=chosen.topk_weights.float(),
            alpha=rules.gemm1_alpha,
            limit=rules.gemm1_clamp_limit,
            beta=_BETA,
        )
        return StandardCombineInput(hidden_states=total)
