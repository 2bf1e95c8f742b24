"""vLLM's layers around weights in their stored bytes, multiplied by our CPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.stored_matrix import Kind, StoredMatrix
from m3_plugin.checkpoint.stored_layers import StoredExperts, StoredLinear, stored_layout
from m3_plugin.quantization.dialects import Quantization
from m3_plugin.quantization.packing import Layout
from m3_vllm.local_experts import local_ids
from m3_vllm.weights import FUSED_EITHER_WAY


def stored_method(
    quantization: Quantization, layer: nn.Module, prefix: str
) -> QuantizeMethodBase | None:
    """The method of a layer of our model; None leaves vLLM's own for plain weights.

    Raises
    ------
    ValueError : stored in a form that our kernels do not read.
    """
    if isinstance(layer, RoutedExperts):
        experts = prefix.removesuffix(".routed_experts")
        layout = stored_layout(quantization, f"{experts}.0.w1", fused={})
        return None if layout is None else StoredExpertsMethod(layer.moe_config, layout)
    if isinstance(layer, LinearBase):
        layout = stored_layout(quantization, prefix, fused=FUSED_EITHER_WAY)
        return UnquantizedLinearMethod() if layout is None else StoredLinearMethod(layout)
    return None


class StoredLinearMethod(StoredLinear, LinearMethodBase):
    """A linear layer whose parameters are the parts of a `StoredMatrix`."""

    @staticmethod
    def multiply(x: Tensor, weight: StoredMatrix) -> Tensor:
        """As one node of a compiled graph."""
        return torch.ops.vllm.m3_stored_linear(
            x, weight.codes, weight.scales, weight.zeros, weight.factors, weight.kind, weight.group
        )


class StoredExpertsMethod(FusedMoEMethodBase):
    """Routed experts whose parameters are the parts of two `StoredMatrix`, w13 and w2."""

    def __init__(self, moe: Any, layout: Layout) -> None:
        super().__init__(moe)
        self.experts = StoredExperts(layout, place_of=self._place_of)

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

    def _place_of(self, layer: Any, expert: int) -> tuple[int, int]:
        local = layer._map_global_expert_id_to_local_expert_id(expert)
        return local, self.moe.moe_parallel_config.tp_rank

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Of vLLM's kernels, of which none runs."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        return self.experts.apply(
            layer,
            x,
            expert_ids=local_ids(layer, topk_ids),
            expert_weights=topk_weights,
            alpha=layer.swiglu_alpha,
            limit=layer.swiglu_limit,
            beta=layer.swiglu_beta,
        )


def m3_stored_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    factors: Tensor | None,
    kind: str,
    group: int,
) -> Tensor:
    """`quantised_linear` as one node of a compiled graph."""
    known: Kind = kind  # type: ignore[assignment]
    return quantised_linear(x, StoredMatrix(known, codes, scales, group, zeros, factors))


def _m3_stored_linear_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    factors: Tensor | None,
    kind: str,
    group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


direct_register_custom_op(
    op_name="m3_stored_linear",
    op_func=m3_stored_linear,
    mutates_args=[],
    fake_impl=_m3_stored_linear_fake,
)
