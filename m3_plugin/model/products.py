"""What multiplies with plain weights of 16 bits on a CPU: the host's library, or our own product.

torch hands such products to oneDNN, which has them for processors with AVX-512 or with products of
these numbers. On all others it falls back to a loop that runs at a sixth of fp32's speed from a few
rows on, and so do both hosts. `quantised_linear` reads the same weights where they lie, widens a
tile of them at a time and sums in fp32: no second copy, one rounding, and a row's bits do not
depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import m3_kernels
from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.stored_matrix import UNIT, StoredMatrix
from m3_plugin.settings import Settings

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ProductChoice:
    """Who multiplies with plain weights.

    Attributes
    ----------
    own : whether our product does; the host's otherwise
    reason : why, for a log
    """

    own: bool
    reason: str

    def describe(self) -> str:
        """One line for a log."""
        return f"{'quantised_linear (native)' if self.own else 'the host'}: {self.reason}"


def choose_products(device_type: str, dtype: torch.dtype, *, settings: Settings) -> ProductChoice:
    """Our product wherever the host's library has none for these numbers.

    Parameters
    ----------
    device_type : `torch.device.type`
    dtype : of the weights
    """
    if device_type != "cpu":
        return ProductChoice(False, "our product is for CPUs")
    if dtype not in NARROW:
        return ProductChoice(False, f"torch's library multiplies {_name(dtype)}")
    if settings.products == "host":
        return ProductChoice(False, "requested by M3_PLUGIN_PRODUCTS")
    if settings.kernels not in ("auto", "native"):
        return ProductChoice(False, f"M3_PLUGIN_KERNELS={settings.kernels} leaves out ours")
    refusal = m3_kernels.kernel_families("cpu")[0].refusal
    if refusal is not None:
        return ProductChoice(False, f"ours cannot run: {refusal}")
    if settings.products == "own":
        return ProductChoice(True, "requested by M3_PLUGIN_PRODUCTS")
    if library_multiplies(dtype):
        return ProductChoice(False, f"torch's library multiplies {_name(dtype)} on this processor")
    return ProductChoice(
        True, f"torch's library has no products of {_name(dtype)} for this processor"
    )


def library_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of 16 bits for this processor, as torch and both hosts ask."""
    asked = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(asked[dtype]())


def takes(weight: Tensor) -> bool:
    """Whether our product reads a plain weight [rows, columns], or one per expert, as it lies."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in NARROW
        and weight.dim() in (2, 3)
        and weight.shape[-1] % UNIT == 0
        and weight.is_contiguous()
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., columns] with a plain weight [rows, columns] to [..., rows] of x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    out = quantised_linear(rows, StoredMatrix("plain", weight.detach())).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
