"""The oracle of `mxfp8_linear`: one group of columns at a time, summed in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3_kernels.mxfp8_linear.call import Mxfp8Linear


def mxfp8_linear_reference(call: Mxfp8Linear) -> None:
    """Fill `call.out`."""
    x, starts = call.x, call.group_starts
    bounds = [0, x.shape[0]] if starts is None else starts.tolist()
    call.out.zero_()
    for group, (weight, scales) in enumerate(zip(*call.matrices, strict=True)):
        decoded = decoded_weight(weight, scales, x.dtype).double()
        rows = slice(bounds[group], bounds[group + 1])
        call.out[rows] = (x[rows].double() @ decoded.T).to(x.dtype)


def decoded_weight(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, from values and stored exponents."""
    table = [2.0 ** (stored - 127) for stored in range(255)] + [math.nan]
    factors = torch.tensor(table, dtype=torch.float64, device=weight.device)[scales.long()]
    parts = zip(weight.double().split(32, dim=1), factors.unbind(1), strict=True)
    return torch.cat([values * factor[:, None] for values, factor in parts], dim=1).to(dtype)
