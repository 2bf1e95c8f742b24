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
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.stored_matrix import Kind, StoredMatrix
from m3_plugin.checkpoint.stored_layers import (
    StoredWeight,
    stored_layout,
    stored_parameters,
    write_expert,
)
from m3_plugin.quantization.dialects import Quantization
from m3_plugin.quantization.packing import Layout
from m3_vllm.weights import FUSED


def stored_method(
    quantization: Quantization, layer: nn.Module, prefix: str
) -> QuantizeMethodBase | None:
    """The method of a layer of our model; None leaves vLLM's own for plain weights.

    Raises
    ------
    ValueError : stored in a form that our kernels do not read.
    """
    fused = {projection: fused for projection, (fused, _) in FUSED.items()}
    if isinstance(layer, RoutedExperts):
        experts = prefix.removesuffix(".routed_experts")
        layout = stored_layout(quantization, f"{experts}.0.w1", fused={})
        return None if layout is None else StoredExpertsMethod(layer.moe_config, layout)
    if isinstance(layer, LinearBase):
        layout = stored_layout(quantization, prefix, fused=fused | {"index_q_proj": "index_proj"})
        return UnquantizedLinearMethod() if layout is None else StoredLinearMethod(layout)
    return None


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
        weight = self.weight.of(layer)
        out = torch.ops.vllm.m3_stored_linear(
            x.reshape(-1, x.shape[-1]),
            weight.codes,
            weight.scales,
            weight.zeros,
            weight.factors,
            weight.kind,
            weight.group,
        ).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class StoredExpertsMethod(FusedMoEMethodBase):
    """Routed experts whose parameters are the parts of two `StoredMatrix`, w13 and w2."""

    def __init__(self, moe: Any, layout: Layout) -> None:
        super().__init__(moe)
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
            expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if expert >= 0:
                rank = self.moe.moe_parallel_config.tp_rank
                write_expert(parameter, tensor, matrix=shard_id, expert=expert, rank=rank)

        sizes = {
            self.w13: ((num_experts, 2 * intermediate_size_per_partition), hidden_size),
            self.w2: ((num_experts, hidden_size), intermediate_size_per_partition),
        }
        for weight, (rows, columns) in sizes.items():
            for name, parameter in stored_parameters(weight.layout, rows, columns).items():
                set_weight_attrs(parameter, extra_weight_attrs | {"weight_loader": load})
                layer.register_parameter(f"{weight.prefix}{name}", parameter)

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
        if layer.expert_map is not None:
            # experts of other ranks become -1
            topk_ids = layer.expert_map[topk_ids.long()]
        return quantised_experts(
            x,
            self.w13.of(layer),
            self.w2.of(layer),
            expert_ids=topk_ids.int(),
            expert_weights=topk_weights.float(),
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
