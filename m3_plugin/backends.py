"""Which kernels can run here, in which order of preference, and why the others cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import m3_kernels
from m3_kernels.capability import Implementation
from m3_plugin.settings import KernelFamily

FULL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_ARCH = 80
E4M3_ARCH = 89


class NoKernelError(RuntimeError):
    """No kernel family can serve MSA on this device; the message says why for each of them."""


@dataclass(frozen=True)
class KernelChoice:
    """The kernel family a session will use, and the reason for every family it did not take.

    Attributes
    ----------
    family : name understood by the ops' `backend` argument
    reason : why this one
    refused : (family, reason) of each preferred family that cannot run here
    """

    family: Implementation
    reason: str
    refused: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """One line for a log: the family, why, and what was refused."""
        refused = "; ".join(f"{name} refused: {why}" for name, why in self.refused)
        return f"{self.family} ({self.reason}{'; ' + refused if refused else ''})"


def choose_kernels(device_type: str, requested: KernelFamily = "auto") -> KernelChoice:
    """Pick the kernel family for a device; never falls back without a reason to show.

    Parameters
    ----------
    device_type : `torch.device.type`, e.g. "cpu" or "cuda"
    requested : a family by name, or "auto" for the best available one

    Raises
    ------
    NoKernelError : the requested family, or every family, is refused; all reasons are named.
    """
    candidates = m3_kernels.kernel_families(device_type)
    refused = tuple((c.name, c.refusal) for c in candidates if c.refusal is not None)
    if requested == "auto":
        for candidate in candidates:
            if candidate.refusal is None:
                earlier = [c.name for c in candidates[: candidates.index(candidate)]]
                return KernelChoice(
                    family=candidate.name,
                    reason=f"best available on {device_type}",
                    refused=tuple(entry for entry in refused if entry[0] in earlier),
                )
        reasons = "; ".join(f"{name}: {why}" for name, why in refused)
        raise NoKernelError(f"no MSA kernels for device {device_type!r} ({reasons})")
    for candidate in candidates:
        if candidate.name == requested:
            if candidate.refusal is not None:
                raise NoKernelError(
                    f"M3_PLUGIN_KERNELS={requested} cannot run on {device_type!r}: "
                    f"{candidate.refusal}"
                )
            return KernelChoice(family=candidate.name, reason="requested by M3_PLUGIN_KERNELS")
    raise NoKernelError(
        f"M3_PLUGIN_KERNELS={requested} does not exist on {device_type!r}; "
        f"known: {', '.join(c.name for c in candidates)}"
    )


def require_served(
    kernels: KernelChoice,
    *,
    arch: int | None,
    cache_dtype: torch.dtype,
    index_dtype: torch.dtype,
) -> None:
    """Refuse caches that the chosen kernels cannot read on this chip, before memory is spent.

    Parameters
    ----------
    arch : compute capability as major * 10 + minor; None for a CPU
    cache_dtype : of K and V pages
    index_dtype : of index-key pages

    Raises
    ------
    NoKernelError : names chip, dtype and the alternative.
    """
    if arch is not None and arch < OLDEST_ARCH:
        raise NoKernelError(
            f"MSA kernels need compute capability 8.0 (Ampere) or newer; this device has "
            f"{_capability(arch)}"
        )
    refusals = (
        ("K and V", cache_dtype, _kv_refusal(kernels.family, arch, cache_dtype)),
        ("index keys", index_dtype, _index_refusal(kernels.family, arch, index_dtype)),
    )
    for name, dtype, refusal in refusals:
        if refusal is not None:
            raise NoKernelError(f"{name} cannot be cached as {dtype}: {refusal}")


def _kv_refusal(family: Implementation, arch: int | None, dtype: torch.dtype) -> str | None:
    """Why a family cannot read K and V of this dtype, and what it can; None if it can."""
    if dtype in FULL_DTYPES:
        return None
    if family != "triton" or arch is None:
        return f"kernel family {family!r} reads float32, bfloat16 and float16; use one of these"
    if dtype == torch.float8_e5m2:
        return None
    return _e4m3_refusal(arch, dtype, others="float8_e5m2 or bfloat16")


def _index_refusal(family: Implementation, arch: int | None, dtype: torch.dtype) -> str | None:
    """Why a family cannot read index keys of this dtype, and what it can; None if it can."""
    if dtype in (*FULL_DTYPES, torch.int8):
        return None
    if family != "triton" or arch is None:
        return (
            f"kernel family {family!r} reads float32, bfloat16, float16 and int8; use one of these"
        )
    return _e4m3_refusal(arch, dtype, others="int8 or bfloat16")


def _e4m3_refusal(arch: int, dtype: torch.dtype, *, others: str) -> str | None:
    """Why a GPU cannot read this dtype, which may be e4m3; None if it can."""
    if dtype != torch.float8_e4m3fn:
        return f"no kernel reads it; use {others}"
    if arch >= E4M3_ARCH:
        return None
    return f"that needs compute capability 8.9, this device has {_capability(arch)}; use {others}"


def _capability(arch: int) -> str:
    return f"{arch // 10}.{arch % 10}"
