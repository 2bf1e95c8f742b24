"""`quantised_experts` in plain torch: expert by expert, each decoded while it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.quantised_experts.call import QuantisedExperts, SwiGLU
from m3_kernels.quantised_linear.call import QuantisedLinear
from m3_kernels.quantised_linear.torch_cpu import quantised_linear_torch
from m3_kernels.stored_matrix import StoredMatrix


def quantised_experts_torch(call: QuantisedExperts) -> None:
    """Fill `call.out`."""
    total = torch.zeros(call.out.shape, dtype=torch.float32)
    wide = call.x.float()
    for expert in range(call.w2.codes.shape[0]):
        tokens, choices = (call.expert_ids == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        inner = activate(
            _product(wide[tokens], call.w13.part(expert, slice(None))), call.activation
        )
        parts = _product(inner, call.w2.part(expert, slice(None)))
        total.index_add_(0, tokens, parts * call.expert_weights[tokens, choices, None])
    call.out.copy_(total)


def activate(gate_up: Tensor, rule: SwiGLU) -> Tensor:
    """fp32 [rows, 2 * intermediate], gates first, to [rows, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=rule.limit)
    up = up.clamp(-rule.limit, rule.limit) + rule.beta
    return up * gate * torch.sigmoid(rule.alpha * gate)


def _product(x: Tensor, weight: StoredMatrix) -> Tensor:
    call = QuantisedLinear(x, weight, None, x.new_empty(len(x), weight.rows))
    quantised_linear_torch(call)
    return call.out
