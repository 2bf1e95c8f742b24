"""`quantised_experts` through the C++ kernels."""

from __future__ import annotations

from m3_kernels.native_build import array, matrix_arguments
from m3_kernels.native_build import call as run
from m3_kernels.quantised_experts.call import QuantisedExperts


def quantised_experts_native(call: QuantisedExperts) -> None:
    """Fill `call.out`."""
    tensors13, numbers13 = matrix_arguments(call.w13)
    tensors2, numbers2 = matrix_arguments(call.w2)
    rule = call.activation
    run(
        "m3_quantised_experts",
        array(call.x),
        *tensors13,
        *tensors2,
        *numbers13,
        *numbers2,
        array(call.expert_ids),
        array(call.expert_weights),
        float(rule.alpha),
        float(rule.limit),
        float(rule.beta),
        array(call.out),
    )
