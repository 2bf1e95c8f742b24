"""The oracle of `quantised_experts`: token by token and choice by choice, in fp64."""

from __future__ import annotations

import torch

from m3_kernels.quantised_experts.call import QuantisedExperts
from m3_kernels.quantised_linear.reference import decoded_matrix


def quantised_experts_reference(call: QuantisedExperts) -> None:
    """Fill `call.out`."""
    rule = call.activation
    decoded = {
        expert: [decoded_matrix(w.part(expert, slice(None))).double() for w in (call.w13, call.w2)]
        for expert in call.expert_ids.unique().tolist()
        if 0 <= expert < call.w2.codes.shape[0]
    }
    for token, row in enumerate(call.x.double()):
        total = torch.zeros_like(row)
        choices = zip(call.expert_ids[token].tolist(), call.expert_weights[token], strict=True)
        for expert, weight in choices:
            if expert not in decoded:
                continue
            w13, w2 = decoded[expert]
            gate, up = (w13 @ row).chunk(2)
            gate = gate.clamp(max=rule.limit)
            up = up.clamp(-rule.limit, rule.limit) + rule.beta
            total += weight.double() * (w2 @ (up * gate * torch.sigmoid(rule.alpha * gate)))
        call.out[token] = total.to(call.out.dtype)
