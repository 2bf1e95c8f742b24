"""What every benchmark reports the same way: the machine, the options, JSON and pictures."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class GateError(RuntimeError):
    """Two implementations disagree, so no speed of theirs is worth printing."""


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes
    ----------
    colour : of matplotlib
    points : (x, median, first quartile, third quartile), x ascending
    line : matplotlib's line style
    """

    label: str
    colour: str
    points: tuple[tuple[float, float, float, float], ...]
    line: str = "o-"


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a picture: times against context, both logarithmic.

    Attributes
    ----------
    share : its values are parts of 1, drawn from 0 on a linear axis
    """

    title: str
    curves: tuple[Curve, ...]
    share: bool = False


def machine_facts() -> dict[str, Any]:
    """Processor, system, versions, commit and time of a run."""
    import torch

    return {
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu_facts(index: int = 0) -> dict[str, Any]:
    """Name, architecture, memory, driver and library versions of a CUDA device."""
    import torch

    gpu = torch.cuda.get_device_properties(index)
    try:
        import triton
    except ImportError:
        triton_version = None
    else:
        triton_version = triton.__version__
    return {
        "gpu": gpu.name,
        "arch": f"sm_{gpu.major}{gpu.minor}",
        "sms": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "triton": triton_version,
    }


def load_average() -> list[float] | None:
    """Runnable processes over 1, 5 and 15 minutes: whether the machine was quiet."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def numbers(text: str, option: str) -> list[int]:
    """The positive integers of an option such as "8192,32768"; empty text gives none.

    Raises
    ------
    typer.BadParameter : names the option.
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"not numbers: {text!r}", param_hint=option) from None
    if any(number < 1 for number in found):
        raise typer.BadParameter(f"must be positive: {text!r}", param_hint=option)
    return found


def short(number: float) -> str:
    """Three significant digits, as far as a table needs them."""
    digits = 0 if number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{digits}f}"


def progress_bar() -> Progress:
    """A bar on stderr which leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def headline(machine: dict[str, Any]) -> str:
    """The machine, torch and the commit of `machine_facts`, as every printed report begins."""
    name = machine.get("gpu", machine["cpu"])
    return f"{name}; torch {machine['torch']}, commit {machine['commit']}"


def table_of(title: str, *, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table with names on the left and numbers on the right; where it is narrow, names wrap."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in left:
        table.add_column(heading, overflow="fold", min_width=4)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def plot_panels(panels: Sequence[Panel], path: Path, *, title: str, unit: str) -> None:
    """Draw times against context, quartiles as bands.

    Parameters
    ----------
    unit : what the vertical axis shows, but for shares
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve in panel.curves:
            at, median, low, high = zip(*curve.points, strict=True)
            axis.plot(at, median, curve.line, color=curve.colour, label=curve.label)
            axis.fill_between(at, low, high, color=curve.colour, alpha=0.2)
        ticks = sorted({point[0] for curve in panel.curves for point in curve.points})
        axis.set_xscale("log", base=2)
        if panel.share:
            highest = max(point[1] for curve in panel.curves for point in curve.points)
            axis.set_ylim(0, min(1.0, 1.5 * highest))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axis.set_yscale("log")
            # powers of ten are too few where times differ by less than one
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks])
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("share" if panel.share else unit)
        axis.set_title(panel.title)
        axis.grid(True, which="both", alpha=0.2)
        axis.legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    family = f"family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return f"{facts.get('model name', platform.machine())} {family}".strip()


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def _commit() -> str | None:
    """The commit of the sources, "+" appended if the kernels differ from it; None outside git."""
    import m3_kernels

    folder = Path(m3_kernels.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", str(folder))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
