"""One call of `quantised_experts`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.stored_matrix import StoredMatrix


@dataclass(frozen=True)
class SwiGLU:
    """`(clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`."""

    alpha: float
    limit: float
    beta: float


@dataclass(frozen=True)
class QuantisedExperts:
    """All an implementation of `quantised_experts` gets; the public function says what it means.

    Attributes
    ----------
    x : [T, hidden], any strides with a contiguous last dimension
    w13 : [experts, 2 * intermediate, hidden], all gate rows, then all up rows
    w2 : [experts, hidden, intermediate]
    expert_ids : int32 [T, choices]
    expert_weights : fp32 [T, choices]
    activation : between the two
    out : [T, hidden] of x's dtype, filled

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    x: Tensor
    w13: StoredMatrix
    w2: StoredMatrix
    expert_ids: Tensor
    expert_weights: Tensor
    activation: SwiGLU
    out: Tensor

    def __post_init__(self) -> None:
        x, w13, w2 = self.x, self.w13, self.w2
        validation.require_float("x", x)
        validation.require_shape("x", x, (None, w13.columns), "[T, hidden]")
        validation.require_dense_rows("x", x)
        for name, weight in (("w13", w13), ("w2", w2)):
            validation.require_device(name, weight.codes, x.device)
            if weight.codes.dim() != 3:
                raise ValueError(f"{name} must be [experts, rows, columns]; got two dimensions")
        shape = (w2.codes.shape[0], w2.rows, 2 * w2.columns)
        if (w13.codes.shape[0], w13.columns, w13.rows) != shape:
            raise ValueError(
                "w13 must be [experts, 2 * intermediate, hidden] of w2 [experts, hidden, "
                f"intermediate]; got {w13.rows} x {w13.columns} and {w2.rows} x {w2.columns}, of "
                f"{w13.codes.shape[0]} and {w2.codes.shape[0]} experts"
            )
        validation.require_dtype("expert_ids", self.expert_ids, torch.int32)
        validation.require_dtype("expert_weights", self.expert_weights, torch.float32)
        validation.require_shape("expert_ids", self.expert_ids, (len(x), None), "[T, choices]")
        choices = tuple(self.expert_ids.shape)
        validation.require_shape("expert_weights", self.expert_weights, choices, "[T, choices]")
        for name, tensor in (("ids", self.expert_ids), ("weights", self.expert_weights)):
            validation.require_device(f"expert_{name}", tensor, x.device)
        validation.require_shape("out", self.out, tuple(x.shape), "[T, hidden]")

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.x.device

    @property
    def pages(self) -> tuple[()]:
        """Of caches it has nothing."""
        return ()
