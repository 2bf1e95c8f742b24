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
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import nn

from m3_plugin.checkpoint.stored_layers import StoredExperts, StoredLinear, stored_layout
from m3_plugin.quantization.packing import Layout
from m3_sglang.checkpoint_config import CheckpointConfig
from m3_sglang.ours import STORED_METHOD
from m3_sglang.weights import FUSED

# SGLang's experts add a fixed 1 to `up`.
_BETA = 1.0


class M3StoredConfig(CheckpointConfig):
    """Each layer by the format of its weights, or plain."""

    name = STORED_METHOD

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, FusedMoE):
            layout = stored_layout(self.quantization, f"{prefix}.0.w1", fused={})
            return None if layout is None else StoredExpertsMethod(layout)
        if isinstance(layer, LinearBase):
            layout = stored_layout(self.quantization, prefix, fused=FUSED)
            return UnquantizedLinearMethod() if layout is None else StoredLinearMethod(layout)
        return None


class StoredLinearMethod(StoredLinear, LinearMethodBase):
    """A linear layer whose parameters are the parts of a `StoredMatrix`."""


class StoredExpertsMethod(FusedMoEMethodBase):
    """Routed experts whose parameters are the parts of two `StoredMatrix`, w13 and w2."""

    def __init__(self, layout: Layout) -> None:
        self.experts = StoredExperts(layout, place_of=_place_of)

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.experts.create(
            layer,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size_per_partition,
            attributes=extra_weight_attrs,
        )

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """Nothing of SGLang's runs: `apply` is the whole of it."""

    def apply(self, layer: nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """The weighted sum of each token's experts."""
        chosen = dispatch_output.topk_output
        rules: Any = layer.moe_runner_config
        total = self.experts.apply(
            layer,
            dispatch_output.hidden_states,
            expert_ids=chosen.topk_ids,
            expert_weights=chosen.topk_weights,
            alpha=rules.gemm1_alpha,
            limit=rules.gemm1_clamp_limit,
            beta=_BETA,
        )
        return StandardCombineInput(hidden_states=total)


def _place_of(layer: Any, expert: int) -> tuple[int, int]:
    return expert - layer.moe_ep_rank * layer.num_local_experts, layer.moe_tp_rank
