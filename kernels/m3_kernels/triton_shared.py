"""Device functions and dtypes that the Triton kernels of several ops share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

DOT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def require_e4m3(op: str, name: str, pages: Tensor, arch: int, *, instead: str) -> None:
    """Refuse e4m3 pages on chips that cannot read them.

    Raises
    ------
    NotImplementedError : the pages are e4m3 and `arch` is below 89
    """
    if pages.dtype == torch.float8_e4m3fn and arch < 89:
        raise NotImplementedError(
            f"{op}: float8_e4m3fn {name} need compute capability 8.9; this device has "
            f"{arch // 10}.{arch % 10}. Keep {instead} instead"
        )


def aligned_for_descriptors(pages: Tensor) -> bool:
    """Whether TMA can address a pool: its start and its strides are multiples of 16 bytes."""
    size = pages.element_size()
    strides = pages.stride()[:-1]
    return pages.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in strides)


def descriptor(
    pages: Tensor, tile: list[int], *, name: str, kept: dict[tuple[object, ...], Any]
) -> TensorDescriptor:
    """A pool as TMA reads tiles of it, made once and then kept with the pages.

    Parameters
    ----------
    name : of the pool among those that `kept` is of
    """
    key = (name, *tile)
    if key not in kept:
        kept[key] = TensorDescriptor(pages, list(pages.shape), list(pages.stride()), tile)
    return kept[key]


def dependent_launch(device: torch.device, arch: int) -> dict[str, bool]:
    """Arguments of a launch that may begin while the one before it ends, where the chip can.

    Programmatic dependent launch hides the start of a kernel behind the end of the one before. It
    is right as long as every kernel of the chain either calls `await_previous_launch` in all its
    programs, as those of this package do, or is launched in the ordinary way.
    """
    # meta tensors stand in for a GPU's; the interpreter's are on the CPU
    if arch < 90 or device.type == "cpu":
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def await_previous_launch(PDL: tl.constexpr):
    """Wait until the launch before this one is complete, then let the next one be set up.

    The first statement of a kernel: before any load, any store, and any return. A program that left
    without waiting could let its grid end before the one before it, and the next but one would read
    what is not yet written. The wait also does no harm to an ordinary launch.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pick(vector, place, SIZE: tl.constexpr):
    """Element `place` of SIZE numbers in registers, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == place, vector, 0), axis=0)


@triton.jit
def load_slots(
    start,
    page,
    first,
    stride_page,
    stride_slot,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    KEYS: tl.constexpr,
):
    """What a page holds in its slots from `first` on, [KEYS, DIM_PAD]; zeros past its edges."""
    slot = first + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM_PAD)
    rows = start + page.to(tl.int64) * stride_page + slot.to(tl.int64) * stride_slot
    places = rows[:, None] + dim[None, :]
    if PAGE_SIZE % KEYS == 0 and DIM == DIM_PAD:
        tile = tl.load(places)
    else:
        inside = (slot < PAGE_SIZE)[:, None] & (dim < DIM)[None, :]
        tile = tl.load(places, mask=inside, other=0.0)
    return tile
