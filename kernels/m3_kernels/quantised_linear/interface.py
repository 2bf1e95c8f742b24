"""Contract and implementations of `quantised_linear`."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.quantised_linear.call import QuantisedLinear
from m3_kernels.stored_matrix import StoredMatrix

QUANTISED_LINEAR = Op[QuantisedLinear](
    "quantised_linear",
    {
        "native": Runs("native:quantised_linear_native"),
        "torch": Runs("torch_cpu:quantised_linear_torch"),
        "reference": Runs("reference:quantised_linear_reference"),
    },
)


def quantised_linear(
    x: Tensor,
    weight: StoredMatrix,
    *,
    group_starts: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`x @ weight.T` for weights that stay in their stored bytes, on a CPU.

    Parameters
    ----------
    x : fp32, bf16 or fp16 [T, columns], any strides with a contiguous last dimension
    weight : [rows, columns], or [groups, rows, columns] with `group_starts`
    group_starts : int32 [groups + 1], never decreasing: group g has the rows of x from
        group_starts[g] to before group_starts[g + 1]; rows of no group become 0
    backend : an implementation by name, or "auto" for the best one here; Triton has none

    Returns
    -------
    [T, rows] of x's dtype. Weights are decoded to fp32, x is widened, sums are fp32.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device, layout or group start is not in the contract
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    # with groups there may be rows of none
    made = x.new_empty if group_starts is None else x.new_zeros
    call = QuantisedLinear(x, weight, group_starts, made(x.shape[0], weight.rows))
    QUANTISED_LINEAR.run(call, backend=backend)
    return call.out
