"""The oracle of `quantised_linear`: weights decoded by the formats' definitions, sums in fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from m3_kernels.quantised_linear.call import QuantisedLinear
from m3_kernels.stored_matrix import FOUR_BITS, MIDDLE, StoredMatrix

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantised_linear_reference(call: QuantisedLinear) -> None:
    """Fill `call.out`."""
    x, out = call.x, call.out
    out.zero_()
    for group, (first, last) in enumerate(pairwise(call.bounds())):
        decoded = decoded_matrix(call.weight.part(group, slice(None))).double()
        out[first:last] = (x[first:last].double() @ decoded.T).to(out.dtype)


def decoded_matrix(matrix: StoredMatrix) -> Tensor:
    """fp32 [rows, columns] of a matrix without groups, each product rounded to fp32."""
    kind, codes = matrix.kind, matrix.codes
    if matrix.scales is None:
        return codes.float()
    if kind in FOUR_BITS:
        codes = torch.stack((codes % 16, codes // 16), dim=-1).flatten(-2)
    if kind == "int4":
        values = codes.float()
    elif kind in FOUR_BITS:
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes.long()]
    else:
        values = codes.view(torch.float8_e4m3fn).float()
    scales = _scales(matrix)
    group = torch.arange(matrix.columns) // matrix.group
    if kind == "int4":
        zeros = torch.full_like(scales, MIDDLE) if matrix.zeros is None else matrix.zeros.float()
        values = values - zeros[:, group]
    return values * scales[:, group]


def _scales(matrix: StoredMatrix) -> Tensor:
    """fp32 [rows, groups]."""
    scales = matrix.scales
    assert scales is not None
    if matrix.kind in ("mxfp8", "mxfp4"):
        table = [2.0 ** (stored - 127) for stored in range(255)] + [math.nan]
        return torch.tensor(table, dtype=torch.float32)[scales.long()]
    if matrix.kind == "nvfp4":
        assert matrix.factors is not None
        return scales.view(torch.float8_e4m3fn).float() * matrix.factors[:, None]
    return scales.float()
