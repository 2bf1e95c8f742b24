"""Which implementations of the ops can run on a device, in order of preference, and why not."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import torch

from m3_kernels import native_build

Backend = Literal["auto", "reference", "torch", "native", "triton"]
Implementation = Literal["reference", "torch", "native", "triton"]

CPU_ONLY = "computes on CPU tensors only"


@dataclass(frozen=True)
class KernelFamily:
    """One implementation of all ops, as seen from one device type.

    Attributes
    ----------
    name : value of the ops' `backend` argument
    refusal : why it cannot run here, for a person to read; None if it can
    """

    name: Implementation
    refusal: str | None = None


def kernel_families(device_type: str) -> tuple[KernelFamily, ...]:
    """Implementations for a device, best first.

    The first call for "cpu" compiles the C++ kernels when no cached build exists (seconds).

    Parameters
    ----------
    device_type : `torch.device.type`, e.g. "cpu" or "cuda"

    Returns
    -------
    Every implementation, refused ones included with their reason.
    """
    if device_type == "cpu":
        return (
            KernelFamily("native", native_build.refusal()),
            KernelFamily("torch"),
            KernelFamily("reference"),
            # Last, so that "auto" never runs kernels one program after another.
            KernelFamily("triton", _interpreter_refusal()),
        )
    if device_type == "cuda":
        return (
            KernelFamily("triton", _compiler_refusal()),
            *(KernelFamily(name, CPU_ONLY) for name in ("native", "torch", "reference")),
        )
    reason = f"no kernels exist for device type {device_type!r}"
    return tuple(KernelFamily(name, reason) for name in ("triton", "native", "torch", "reference"))


def implementation_for(op: str, *, backend: Backend, device_type: str) -> Implementation:
    """Resolve an op's `backend` argument.

    Raises
    ------
    NotImplementedError : nothing can run on this device, or the named implementation cannot;
        the message holds the reason. A named implementation is never replaced by another.
    ValueError : no such backend.
    """
    if device_type == "cpu" and backend in ("auto", "native") and native_build.refusal() is None:
        return "native"  # without a look at the others: this runs for every layer and step
    families = kernel_families(device_type)
    if backend == "auto":
        for family in families:
            if family.refusal is None:
                return family.name
        reasons = "; ".join(sorted({str(f.refusal) for f in families}))
        raise NotImplementedError(f"{op} cannot run on {device_type!r}: {reasons}")
    for family in families:
        if family.name == backend:
            if family.refusal is not None:
                raise NotImplementedError(
                    f"{op}: backend {backend!r} cannot run on {device_type!r}: {family.refusal}"
                )
            return family.name
    known = ", ".join(repr(cast(str, f.name)) for f in families)
    raise ValueError(f"{op}: backend must be 'auto' or one of {known}; got {backend!r}")


@cache
def _triton_is_installed() -> bool:
    """Asked for by every call of an op, and the search walks folders."""
    return importlib.util.find_spec("triton") is not None


def _compiler_refusal() -> str | None:
    """Why Triton kernels cannot be compiled for a GPU.

    Asks no GPU: a host's parent process chooses kernels before CUDA may be started. What the
    device itself cannot do is refused when its session is made. ROCm calls its devices "cuda" too.
    """
    if torch.version.hip is not None:
        return (
            f"this torch is built for ROCm (HIP {torch.version.hip}), and the kernels were only "
            "ever compiled for NVIDIA GPUs"
        )
    if not _triton_is_installed():
        return "Triton is not installed; torch's CUDA wheels bring it (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU; unset it"
    return None


def _interpreter_refusal() -> str | None:
    """Why Triton kernels cannot run on a CPU, or None within Triton's interpreter."""
    if not _triton_is_installed():
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton compiles for GPUs only; TRITON_INTERPRET=1 runs its kernels on the CPU "
            "one program after another, for tests"
        )
    return None
