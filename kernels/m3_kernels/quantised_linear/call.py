"""One call of `quantised_linear`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.stored_matrix import StoredMatrix


@dataclass(frozen=True)
class QuantisedLinear:
    """All an implementation of `quantised_linear` gets; the public function says what it means.

    Attributes
    ----------
    x : [T, columns], any strides with a contiguous last dimension
    weight : of one group, or of several with `group_starts`
    group_starts : int32 [groups + 1], never decreasing; None for one matrix
    out : [T, rows] of x's dtype, filled

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    x: Tensor
    weight: StoredMatrix
    group_starts: Tensor | None
    out: Tensor

    def __post_init__(self) -> None:
        x, weight, starts = self.x, self.weight, self.group_starts
        validation.require_float("x", x)
        validation.require_shape("x", x, (None, weight.columns), "[T, columns]")
        validation.require_dense_rows("x", x)
        validation.require_device("weight", weight.codes, x.device)
        if (starts is not None) != (weight.codes.dim() == 3):
            raise ValueError(
                "group_starts must be given for a weight [groups, rows, columns] and for no other; "
                f"got codes {list(weight.codes.shape)}"
            )
        if starts is not None:
            validation.require_dtype("group_starts", starts, torch.int32)
            count = (weight.codes.shape[0] + 1,)
            validation.require_shape("group_starts", starts, count, "[groups + 1]")
            validation.require_dense_rows("group_starts", starts)
            validation.require_device("group_starts", starts, x.device)
        validation.require_shape("out", self.out, (x.shape[0], weight.rows), "[T, rows]")

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.x.device

    @property
    def pages(self) -> tuple[()]:
        """Of caches it has nothing."""
        return ()

    def bounds(self) -> list[int]:
        """Rows of x at which the groups begin, and the end of the last one.

        Raises
        ------
        ValueError : they fall, or name rows that x has not.
        """
        if self.group_starts is None:
            return [0, self.x.shape[0]]
        found = self.group_starts.tolist()
        if found != sorted(found) or found[0] < 0 or found[-1] > self.x.shape[0]:
            raise ValueError(
                f"group_starts must rise from 0 or more to at most T = {self.x.shape[0]}; "
                f"got {found}"
            )
        return found
