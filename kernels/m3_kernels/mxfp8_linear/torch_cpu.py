"""`mxfp8_linear` in plain torch: any CPU, no compiler; some rows of a weight decoded at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from m3_kernels.mxfp8_linear.call import Mxfp8Linear

# Rows decoded at a time: 24 MB in fp32 for 6,144 columns.
ROWS = 1024


def mxfp8_linear_torch(call: Mxfp8Linear) -> None:
    """Fill `call.out`."""
    x, out, (weight, scales) = call.x, call.out, call.matrices
    bounds = [0, x.shape[0]] if call.group_starts is None else call.group_starts.tolist()
    out.zero_()
    for group, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        for start in range(0, weight.shape[1], ROWS):
            part = slice(start, start + ROWS)
            decoded = _decode(weight[group, part], scales[group, part]).to(x.dtype)
            out[first:last, part] = x[first:last] @ decoded.T


def _decode(values: Tensor, scales: Tensor) -> Tensor:
    factors = scales.view(torch.float8_e8m0fnu).float()
    groups = values.float().unflatten(-1, (factors.shape[-1], -1))
    return (groups * factors.unsqueeze(-1)).flatten(-2)
