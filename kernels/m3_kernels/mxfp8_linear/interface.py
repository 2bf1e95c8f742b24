"""Contract and implementations of `mxfp8_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.mxfp8_linear.call import Mxfp8Linear

MXFP8_LINEAR = Op[Mxfp8Linear](
    "mxfp8_linear",
    {
        "native": Runs("native:mxfp8_linear_native"),
        "torch": Runs("torch_cpu:mxfp8_linear_torch"),
        "triton": Runs("triton:mxfp8_linear_triton"),
        "reference": Runs("reference:mxfp8_linear_reference"),
    },
)


def mxfp8_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    group_starts: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`x @ weight.T` for weights that stay in MXFP8: decoded tile by tile, activations untouched.

    With `group_starts` the rows of x are grouped, and each group has a matrix of its own: the
    experts of a layer, whose tokens the caller has sorted.

    Parameters
    ----------
    x : [T, columns], any strides with a contiguous last dimension
    weight : float8_e4m3fn [rows, columns], or [groups, rows, columns] with `group_starts`
    scales : uint8 [rows, columns / 32] or [groups, rows, columns / 32]; a stored u is the factor
        2 ** (u - 127) of 32 neighbouring columns, 255 is not a number
    group_starts : int32 [groups + 1], never decreasing: group g has the rows of x from
        group_starts[g] to before group_starts[g + 1]; rows of no group become 0
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    [T, rows] of x's dtype. Decoded weights are rounded to it, which changes no e4m3 value times a
    power of two in bfloat16 and float32; sums are fp32.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    rows = weight.shape[-2] if weight.dim() > 1 else 0
    call = Mxfp8Linear(x, weight, scales, group_starts, x.new_empty(*x.shape[:1], rows))
    MXFP8_LINEAR.run(call, backend=backend)
    return call.out


def compile_mxfp8_linear(weight: Tensor, scales: Tensor, *, dtype: torch.dtype) -> None:
    """Have compiled what products of a weight need for any number of tokens; nothing on a CPU.

    So no request waits for a compiler. Once for all weights of a shape.

    Parameters
    ----------
    weight, scales : as in `mxfp8_linear`
    dtype : of the activations
    """
    if weight.device.type == "cuda":
        from m3_kernels.mxfp8_linear.triton import compile_for_all_steps

        compile_for_all_steps(weight, scales, dtype=dtype)
