"""What multiplies with plain weights of 16 bits on a CPU: the host's library, or our own product.

torch hands such products to oneDNN, which has them for processors with AVX-512 or with products of
these numbers. On all others it falls back to a loop that runs at a sixth of fp32's speed from a few
rows on, and so do both hosts. `quantised_linear` reads the same weights where they lie, widens a
tile of them at a time and sums in fp32: no second copy, one rounding, and a row's bits do not
depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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
    slow : whether the host's is torch's loop of 16 bits
    """

    own: bool
    reason: str
    slow: bool = False

    def describe(self) -> str:
        """One line for a log."""
        return f"{'quantised_linear (native)' if self.own else 'the host'}: {self.reason}"

    @property
    def cost(self) -> str:
        """What it costs, in words."""
        if self.own:
            return "weights are widened as they are read: about fp32's time, half its memory"
        if self.slow:
            return "prompts take several times as long as with --dtype float32"
        return "as the host has it"


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
    slow = not library_multiplies(dtype)
    if settings.products == "host":
        return ProductChoice(False, "requested by M3_PLUGIN_PRODUCTS", slow)
    if settings.kernels not in ("auto", "native"):
        return ProductChoice(False, f"M3_PLUGIN_KERNELS={settings.kernels} leaves out ours", slow)
    refusal = m3_kernels.kernel_families("cpu")[0].refusal
    if refusal is not None:
        return ProductChoice(False, f"ours cannot run: {refusal}", slow)
    if settings.products == "own":
        return ProductChoice(True, "requested by M3_PLUGIN_PRODUCTS")
    if not slow:
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


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Bidirectional attention, all [..., heads, rows, head_dim]; for layers that are no host's.

    torch's kernel for CPUs multiplies 16 bits as its library does, and without one in a loop. There
    it gets fp32: the same numbers, of which only the result is rounded.
    """
    if lacks_products(query.device.type, query.dtype):
        wide = torch.nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float()
        )
        return wide.to(query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by whoever has the product; for layers that are no host's.

    Columns that ours does not take, as the 1,176 of a patch of 14x14, are filled up with zeros.
    """
    if not _is_own(weight.device.type, weight.dtype) or x.dtype != weight.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    if not takes(weight):
        missing = (0, -weight.shape[-1] % UNIT)
        x, weight = (torch.nn.functional.pad(rows, missing) for rows in (x, weight))
        weight = weight.contiguous()
    return multiply(x, weight, bias)


@cache
def lacks_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies these numbers in a loop here, for want of a library that does."""
    return device_type == "cpu" and dtype in NARROW and not library_multiplies(dtype)


@cache
def _is_own(device_type: str, dtype: torch.dtype) -> bool:
    if device_type != "cpu":
        return False
    return choose_products(device_type, dtype, settings=Settings.from_environment()).own


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
