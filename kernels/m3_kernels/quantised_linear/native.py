"""`quantised_linear` through the C++ kernels."""

from __future__ import annotations

import torch

from m3_kernels.native_build import array, matrix_arguments
from m3_kernels.native_build import call as run
from m3_kernels.quantised_linear.call import QuantisedLinear


def quantised_linear_native(call: QuantisedLinear) -> None:
    """Fill `call.out`."""
    bounds = torch.tensor(call.bounds(), dtype=torch.int32)
    weight = call.weight.grouped
    tensors, numbers = matrix_arguments(weight)
    run("m3_quantised_linear", array(call.x), *tensors, *numbers, array(bounds), array(call.out))
