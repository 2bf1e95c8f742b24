"""Configurations of the Triton kernels: data in JSON files, chosen by a pure function.

`default.json` holds rows for every kernel; `sm<family>.json` holds what differs on one family of
GPUs. A file maps a kernel's name to a list of rows, each `{"when": {...}, "config": {...}}`. The
first row whose `when` fits is used, and its family's row is laid over the default one. Any `when`
may ask for the release of Triton, which decides what a kernel compiles to. Nothing is measured at
run time: a server never tunes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import torch

Shape = int | str | bool
FAMILIES = (80, 89, 90, 100, 120)

# The interpreter stands in for the chip with the most general code path.
INTERPRETER_ARCH = 80


def family_of(arch: int) -> int:
    """The GPU family whose file applies, e.g. 89 for 86 (same shared memory), 100 for 103.

    Parameters
    ----------
    arch : compute capability as major * 10 + minor

    Raises
    ------
    ValueError : older than 80
    """
    if arch < 80:
        raise ValueError(f"arch must be at least 80 (Ampere); got {arch}")
    if arch in (86, 89):
        return 89
    return max(family for family in FAMILIES if family // 10 <= arch // 10 and family != 89)


def arch_of(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; a fixed one for what is no GPU."""
    return _arch_of_gpu(device) if device.type == "cuda" else INTERPRETER_ARCH


@cache
def _arch_of_gpu(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def kernel_config(kernel: str, *, arch: int, **shape: Shape) -> dict[str, Any]:
    """Meta-parameters of a kernel, `num_warps` and `num_stages` included.

    Parameters
    ----------
    kernel : a name in default.json
    arch : compute capability as major * 10 + minor
    shape : what the rows' `when` may ask about, e.g. page_size=128, key_dtype="bf16"; `triton` is
        the installed release unless it is given

    Raises
    ------
    KeyError : no such kernel, or a `when` asks about something not in `shape`
    ValueError : arch is below 80, or no default row fits the shape
    """
    shape = {"triton": triton_release(), **shape}
    return dict(_config(kernel, arch, tuple(shape.items())))


@cache
def _config(kernel: str, arch: int, shape_items: tuple[tuple[str, Shape], ...]) -> dict[str, Any]:
    """Looked up once: kernels ask for every launch."""
    shape = dict(shape_items)
    default = _first_fitting(_rows("default")[kernel], shape)
    if default is None:
        raise ValueError(f"tuning/default.json has no row of {kernel!r} for {shape}")
    family = _first_fitting(_rows(f"sm{family_of(arch)}").get(kernel, []), shape)
    return {**default, **(family or {})}


@cache
def triton_release() -> int:
    """The installed release as major * 100 + minor, e.g. 306 for 3.6.0; 0 without Triton."""
    try:
        import triton
    except ImportError:
        return 0
    major, minor = triton.__version__.split(".")[:2]
    return int(major) * 100 + int(minor)


@cache
def _rows(name: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text())


def _first_fitting(rows: list[dict[str, Any]], shape: Mapping[str, Shape]) -> dict[str, Any] | None:
    for row in rows:
        if all(_fits(shape[name], wanted) for name, wanted in row.get("when", {}).items()):
            return row["config"]
    return None


def _fits(value: Shape, wanted: Shape | dict[str, int] | list[Shape]) -> bool:
    """Whether a value is in {"min": a, "max": b} (ends included), in a list, or equal."""
    if isinstance(wanted, dict):
        number = int(value)
        return wanted.get("min", number) <= number <= wanted.get("max", number)
    if isinstance(wanted, list):
        return value in wanted
    return value == wanted
