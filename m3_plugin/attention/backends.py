"""Which kernels can run here, in which order of preference, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

import m3_kernels
from m3_kernels.capability import Implementation
from m3_kernels.index_pages import PLANES_DTYPE
from m3_plugin.settings import KernelFamily

FULL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What hosts allocate for each value of M3_PLUGIN_INDEX_KEYS but "auto".
INDEX_KEYS: Mapping[str, torch.dtype] = {"int8": torch.int8, "planes": PLANES_DTYPE}
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
    refused : (name, reason) of what would be preferred and cannot run here, FlashInfer among it
    forced : named by the user, so never replaced
    prefill : what attends for requests of many rows in the place of the family's own kernel; None
        for that kernel
    """

    family: Implementation
    reason: str
    refused: tuple[tuple[str, str], ...] = ()
    forced: bool = False
    prefill: Literal["flashinfer"] | None = None

    @property
    def name(self) -> str:
        """The family, and what does its prefill in its place."""
        return self.family if self.prefill is None else f"{self.family} with {self.prefill}"

    def describe(self) -> str:
        """One line for a log: the family, why, and what was refused."""
        told = [self.reason]
        if self.prefill is not None:
            told.append(f"prefill attention by {self.prefill}")
        told += [f"{name} refused: {why}" for name, why in self.refused]
        return f"{self.family} ({'; '.join(told)})"

    def without_flashinfer(self, reason: str) -> KernelChoice:
        """The same kernels with the family's own prefill.

        Raises
        ------
        NoKernelError : FlashInfer was asked for by name.
        """
        if self.forced:
            raise NoKernelError(f"M3_PLUGIN_KERNELS=flashinfer cannot run here: {reason}")
        refused = (*self.refused, ("flashinfer", reason))
        return replace(self, prefill=None, refused=refused)


def choose_kernels(device_type: str, requested: KernelFamily = "auto") -> KernelChoice:
    """Pick the kernel family for a device; never falls back without a reason to show.

    FlashInfer is no family: it does one step of "triton". By name it is taken here, by "auto" where
    a session is made, because that takes the chip, the layer and a test (`assembly`).

    Parameters
    ----------
    device_type : `torch.device.type`, e.g. "cpu" or "cuda"
    requested : a family or "flashinfer" by name, or "auto" for the best available ones

    Raises
    ------
    NoKernelError : the requested family, or every family, is refused; all reasons are named. ROCm
        is refused whatever is requested, with what to use there.
    """
    if device_type == "cuda" and torch.version.hip is not None:
        raise NoKernelError(
            f"ROCm (HIP {torch.version.hip}) is not supported: the MSA kernels were only ever "
            "compiled for NVIDIA GPUs. Use the host's own MiniMax-M3 there: leave the plugin out, "
            "or set M3_PLUGIN_DISABLE=1"
        )
    candidates = m3_kernels.kernel_families(device_type)
    if requested == "flashinfer" and device_type != "cuda":
        raise NoKernelError(
            f"M3_PLUGIN_KERNELS=flashinfer cannot run on {device_type!r}: it needs a GPU"
        )
    family = "triton" if requested == "flashinfer" else requested
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
        if candidate.name == family:
            if candidate.refusal is not None:
                raise NoKernelError(
                    f"M3_PLUGIN_KERNELS={requested} cannot run on {device_type!r}: "
                    f"{candidate.refusal}"
                )
            return KernelChoice(
                family=candidate.name,
                reason="requested by M3_PLUGIN_KERNELS",
                forced=True,
                prefill="flashinfer" if requested == "flashinfer" else None,
            )
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
    if dtype == PLANES_DTYPE:
        if family != "triton":
            return None
        return (
            "no kernel on a GPU reads two planes yet; leave M3_PLUGIN_INDEX_KEYS=planes out there, "
            "or set it to int8"
        )
    if family != "triton" or arch is None:
        return (
            f"kernel family {family!r} reads float32, bfloat16, float16, int8 and two planes; "
            "use one of these"
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
