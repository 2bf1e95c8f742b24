"""Codes to fp32 with torch's own conversions, for the implementations without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.stored_matrix import MIDDLE, StoredMatrix

_TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def decode(matrix: StoredMatrix) -> Tensor:
    """fp32 [rows, columns] of a matrix without groups."""
    if matrix.scales is None:
        return matrix.codes.float()
    scales = _wide_scales(matrix, matrix.scales)
    if matrix.kind in ("mxfp8", "fp8"):
        values = matrix.codes.view(torch.float8_e4m3fn).float()
    else:
        codes = torch.stack((matrix.codes & 15, matrix.codes >> 4), dim=-1).flatten(-2)
        if matrix.kind == "int4":
            values = codes.float()
        else:
            values = torch.tensor(_TWICE_E2M1, dtype=torch.float32)[codes.int()] * 0.5
    whole = matrix.columns // matrix.group * matrix.group
    parts = []
    # the last group may be shorter
    for first, last in ((0, whole), (whole, matrix.columns)):
        if first == last:
            continue
        groups = slice(first // matrix.group, -(-last // matrix.group))
        part = values[:, first:last].unflatten(-1, (groups.stop - groups.start, -1))
        if matrix.kind == "int4":
            zeros = MIDDLE if matrix.zeros is None else matrix.zeros[:, groups, None].float()
            part = part - zeros
        parts.append((part * scales[:, groups, None]).flatten(-2))
    return torch.cat(parts, dim=-1)


def _wide_scales(matrix: StoredMatrix, scales: Tensor) -> Tensor:
    if matrix.kind in ("mxfp8", "mxfp4"):
        return scales.view(torch.float8_e8m0fnu).float()
    if matrix.kind == "nvfp4":
        assert matrix.factors is not None
        return scales.view(torch.float8_e4m3fn).float() * matrix.factors[:, None]
    return scales.float()
