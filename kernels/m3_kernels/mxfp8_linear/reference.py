"""The oracle of `mxfp8_linear`: one group of columns at a time, summed in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mxfp8_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, *, group_starts: Tensor | None
) -> Tensor:
    """Weights and scales are [groups, rows, ...]; other arguments as in the public function."""
    bounds = [0, x.shape[0]] if group_starts is None else group_starts.tolist()
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64, device=x.device)
    for group in range(weight.shape[0]):
        decoded = decoded_weight(weight[group], scales[group], x.dtype).double()
        rows = slice(bounds[group], bounds[group + 1])
        out[rows] = x[rows].double() @ decoded.T
    return out.to(x.dtype)


def decoded_weight(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, from values and stored exponents."""
    table = [2.0 ** (stored - 127) for stored in range(255)] + [math.nan]
    factors = torch.tensor(table, dtype=torch.float64, device=weight.device)[scales.long()]
    parts = zip(weight.double().split(32, dim=1), factors.unbind(1), strict=True)
    return torch.cat([values * factor[:, None] for values, factor in parts], dim=1).to(dtype)
