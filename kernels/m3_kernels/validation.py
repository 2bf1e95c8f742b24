"""Cheap argument checks shared by the ops: shapes, dtypes, devices; never a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
LOW_PRECISION_DTYPES = (*FP8_DTYPES, torch.int8)


def require_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor has one of the supported floating dtypes."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16; got {tensor.dtype}")


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless the tensor has exactly this dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}")


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], words: str) -> None:
    """Raise ValueError unless the shape matches; None matches any size.

    Parameters
    ----------
    words : the shape in the contract's words, for the message
    """
    actual = tensor.shape
    if len(actual) == len(shape):
        # a loop and no generator: this runs for every tensor of every layer and step
        for want, have in zip(shape, actual, strict=True):
            if want is not None and want != have:
                break
        else:
            return
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} must be {words} = [{sizes}]; got {list(actual)}")


def require_dense_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension is contiguous."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension; got strides {tensor.stride()}"
        )


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor lives on the device of the others."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}; got {tensor.device}")
