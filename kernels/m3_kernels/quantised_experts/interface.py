"""Contract and implementations of `quantised_experts`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.quantised_experts.call import QuantisedExperts, SwiGLU
from m3_kernels.stored_matrix import StoredMatrix

QUANTISED_EXPERTS = Op[QuantisedExperts](
    "quantised_experts",
    {
        "native": Runs("native:quantised_experts_native"),
        "torch": Runs("torch_cpu:quantised_experts_torch"),
        "reference": Runs("reference:quantised_experts_reference"),
    },
)


def quantised_experts(
    x: Tensor,
    w13: StoredMatrix,
    w2: StoredMatrix,
    *,
    expert_ids: Tensor,
    expert_weights: Tensor,
    alpha: float,
    limit: float,
    beta: float,
    backend: Backend = "auto",
) -> Tensor:
    """Routed experts with SwiGLU-OAI, their weights in their stored bytes, on a CPU.

    Parameters
    ----------
    x : fp32, bf16 or fp16 [T, hidden], any strides with a contiguous last dimension
    w13 : [experts, 2 * intermediate, hidden], all gate rows, then all up rows
    w2 : [experts, hidden, intermediate]
    expert_ids : int32 [T, choices]; what is no expert's number (another rank's) adds nothing
    expert_weights : fp32 [T, choices]
    alpha, limit, beta : of `(clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g)` with
        `g = min(gate, limit)`
    backend : an implementation by name, or "auto" for the best one here; Triton has none

    Returns
    -------
    [T, hidden] of x's dtype: the weighted sum of each token's experts. Weights are decoded to fp32;
    everything up to the result is fp32.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    activation = SwiGLU(alpha, limit, beta)
    call = QuantisedExperts(x, w13, w2, expert_ids, expert_weights, activation, out)
    QUANTISED_EXPERTS.run(call, backend=backend)
    return call.out
