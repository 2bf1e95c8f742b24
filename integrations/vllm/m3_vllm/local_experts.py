"""vLLM's routed experts with plain weights on a CPU of whose experts a rank holds some.

vLLM's kernel for experts on a CPU is told no expert map: numbers of other ranks' experts would
index this rank's weights (0.32, `fused_moe/experts/cpu_moe.py`). Ours leaves them out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.stored_matrix import StoredMatrix


class LocalExperts(UnquantizedFusedMoEMethod):
    """vLLM's method for plain experts, which stay as they were loaded; the product is ours."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """This rank's part of [tokens, hidden]."""
        return quantised_experts(
            x,
            StoredMatrix("plain", layer.w13_weight.data),
            StoredMatrix("plain", layer.w2_weight.data),
            expert_ids=local_ids(layer, topk_ids).int(),
            expert_weights=topk_weights.float(),
            alpha=layer.swiglu_alpha,
            limit=layer.swiglu_limit,
            beta=layer.swiglu_beta,
        )


def local_ids(layer: Any, expert_ids: Tensor) -> Tensor:
    """Numbers of this rank's experts; those of other ranks become -1.

    Parameters
    ----------
    layer : vLLM's `RoutedExperts`
    expert_ids : integer [tokens, choices], numbers in the checkpoint
    """
    return expert_ids if layer.expert_map is None else layer.expert_map[expert_ids.long()]


def serve_local_experts(experts: nn.Module) -> None:
    """Give plain experts of a layer just built our product; quantised ones have it already."""
    for layer in experts.modules():
        if type(getattr(layer, "quant_method", None)) is UnquantizedFusedMoEMethod:
            method: Any = layer.quant_method
            layer.quant_method = LocalExperts(method.moe)
