"""Contract, validation and dispatch of `mxfp8_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.capability import Backend, implementation_for

# OCP microscaling: columns that share one power of two.
GROUP = 32


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
    backend : an implementation by name, or "auto" for the best one here; "native" does not exist

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
    device = x.device
    validation.require_float("x", x)
    validation.require_dtype("weight", weight, torch.float8_e4m3fn)
    validation.require_dtype("scales", scales, torch.uint8)
    validation.require_shape("x", x, (None, None), "[T, columns]")
    columns = x.shape[1]
    if columns % GROUP:
        raise ValueError(f"x must have a multiple of {GROUP} columns; got {columns}")
    groups = () if group_starts is None else (None,)
    shape = "[rows, columns]" if group_starts is None else "[groups, rows, columns]"
    validation.require_shape("weight", weight, (*groups, None, columns), shape)
    blocks = (*weight.shape[:-1], columns // GROUP)
    validation.require_shape("scales", scales, blocks, shape.replace("columns", "columns / 32"))
    for name, tensor in (("x", x), ("weight", weight), ("scales", scales)):
        validation.require_dense_rows(name, tensor)
        validation.require_device(name, tensor, device)
    if group_starts is None:
        weight, scales = weight[None], scales[None]
    else:
        validation.require_dtype("group_starts", group_starts, torch.int32)
        count = (weight.shape[0] + 1,)
        validation.require_shape("group_starts", group_starts, count, "[groups + 1]")
        validation.require_dense_rows("group_starts", group_starts)
        validation.require_device("group_starts", group_starts, device)

    implementation = implementation_for("mxfp8_linear", backend=backend, device_type=device.type)
    if implementation == "native":
        if backend == "native":
            raise NotImplementedError(
                "mxfp8_linear has no C++ implementation; use backend='torch' on a CPU"
            )
        implementation = "torch"
    if implementation == "triton":
        from m3_kernels.mxfp8_linear.triton import mxfp8_linear_triton as run
    elif implementation == "torch":
        from m3_kernels.mxfp8_linear.torch_cpu import mxfp8_linear_torch as run
    else:
        from m3_kernels.mxfp8_linear.reference import mxfp8_linear_reference as run
    return run(x, weight, scales, group_starts=group_starts)
