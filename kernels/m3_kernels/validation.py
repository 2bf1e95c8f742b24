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
    if len(actual) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, actual, strict=True)
    ):
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


def require_batch(
    *, page_table: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, device: torch.device
) -> None:
    """Check the three tensors which describe a step; see the README of the ops for their layout."""
    require_dtype("page_table", page_table, torch.int32)
    require_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    require_dtype("seq_lens", seq_lens, torch.int32)
    require_shape("seq_lens", seq_lens, (None,), "[R]")
    num_reqs = seq_lens.shape[0]
    require_shape("page_table", page_table, (num_reqs, None), "[R, max_pages]")
    require_shape("cu_seqlens_q", cu_seqlens_q, (num_reqs + 1,), "[R + 1]")
    require_dense_rows("page_table", page_table)
    require_dense_rows("cu_seqlens_q", cu_seqlens_q)
    require_dense_rows("seq_lens", seq_lens)
    require_device("page_table", page_table, device)
    require_device("cu_seqlens_q", cu_seqlens_q, device)
    require_device("seq_lens", seq_lens, device)
