"""`mxfp8_linear` through the C++ kernels: the kind "mxfp8" of `quantised_linear`."""

from __future__ import annotations

import torch

from m3_kernels.mxfp8_linear.call import GROUP, Mxfp8Linear
from m3_kernels.quantised_linear.call import QuantisedLinear
from m3_kernels.quantised_linear.native import quantised_linear_native
from m3_kernels.stored_matrix import StoredMatrix


def mxfp8_linear_native(call: Mxfp8Linear) -> None:
    """Fill `call.out`."""
    codes, scales = call.weight.view(torch.uint8).contiguous(), call.scales.contiguous()
    weight = StoredMatrix("mxfp8", codes, scales, GROUP)
    call.out.zero_()
    quantised_linear_native(QuantisedLinear(call.x, weight, call.group_starts, call.out))
