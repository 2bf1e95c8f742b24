"""`quantised_linear` through the C++ kernels."""

from __future__ import annotations

from m3_kernels.native_build import array, host_numbers, matrix_arguments
from m3_kernels.native_build import call as run
from m3_kernels.quantised_linear.call import QuantisedLinear


def quantised_linear_native(call: QuantisedLinear) -> None:
    """Fill `call.out`."""
    starts, memory = host_numbers(*call.bounds())
    tensors, numbers = matrix_arguments(call.weight)
    run("m3_quantised_linear", array(call.x), *tensors, *numbers, starts, array(call.out))
    del memory
