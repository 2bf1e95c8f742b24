"""One call of `mxfp8_linear`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation

# OCP microscaling: columns that share one power of two.
GROUP = 32


@dataclass(frozen=True)
class Mxfp8Linear:
    """All that an implementation of `mxfp8_linear` gets; the public function says what it means.

    Attributes
    ----------
    x : [T, columns], any strides with a contiguous last dimension
    weight : float8_e4m3fn [rows, columns], or [groups, rows, columns] with `group_starts`
    scales : uint8 [rows, columns / 32] or [groups, rows, columns / 32]
    group_starts : int32 [groups + 1], never decreasing; None for one matrix
    out : [T, rows] of x's dtype, filled

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    x: Tensor
    weight: Tensor
    scales: Tensor
    group_starts: Tensor | None
    out: Tensor

    def __post_init__(self) -> None:
        x, weight, scales, group_starts = self.x, self.weight, self.scales, self.group_starts
        device = x.device
        validation.require_float("x", x)
        validation.require_dtype("weight", weight, torch.float8_e4m3fn)
        validation.require_dtype("scales", scales, torch.uint8)
        validation.require_shape("x", x, (None, None), "[T, columns]")
        columns = x.shape[1]
        if columns % GROUP:
            raise ValueError(f"x must have a multiple of {GROUP} columns; got {columns}")
        groups = () if group_starts is None else (None,)
        shape = "[rows, columns]" if group_starts is None else "[groups, rows, columns]"
        validation.require_shape("weight", weight, (*groups, None, columns), shape)
        blocks = (*weight.shape[:-1], columns // GROUP)
        validation.require_shape("scales", scales, blocks, shape.replace("columns", "columns / 32"))
        for name, tensor in (("x", x), ("weight", weight), ("scales", scales)):
            validation.require_dense_rows(name, tensor)
            validation.require_device(name, tensor, device)
        if group_starts is not None:
            validation.require_dtype("group_starts", group_starts, torch.int32)
            count = (weight.shape[0] + 1,)
            validation.require_shape("group_starts", group_starts, count, "[groups + 1]")
            validation.require_dense_rows("group_starts", group_starts)
            validation.require_device("group_starts", group_starts, device)
        validation.require_shape("out", self.out, (x.shape[0], weight.shape[-2]), "[T, rows]")

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.x.device

    @property
    def pages(self) -> tuple[()]:
        """Of caches it has nothing."""
        return ()

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Weight and scales with a dimension of groups, [groups, rows, ...]."""
        if self.group_starts is None:
            return self.weight[None], self.scales[None]
        return self.weight, self.scales
