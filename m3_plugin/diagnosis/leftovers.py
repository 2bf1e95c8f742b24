"""What the plugin leaves outside its own packages, where `pip uninstall` does not look."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m3_plugin.diagnosis.findings import Report
from m3_plugin.host.torchvision_ops import hook_files

Kind = Literal["start_hook", "build_cache", "model_info"]

_WHAT: dict[Kind, str] = {
    "start_hook": "runs whenever this Python starts, for a CUDA torchvision beside a CPU torch; "
    "without it such a vLLM does not start",
    "build_cache": "compiled CPU kernels; they are built again when they are needed",
    "model_info": "what vLLM remembers about our model classes; written again at its next start",
}


@dataclass(frozen=True)
class Leftover:
    """A file or folder of ours."""

    kind: Kind
    path: Path

    @property
    def what(self) -> str:
        """What it is for, and what happens without it."""
        return _WHAT[self.kind]


def find_leftovers(site_packages: Path | None = None) -> list[Leftover]:
    """Everything that is there now, in the order in which it should be removed.

    Parameters
    ----------
    site_packages : where the hook may have been installed; by default that of this Python
    """
    return [
        Leftover(kind, path)
        for kind, path in _places(site_packages)
        # a link that leads nowhere is there too
        if path.exists() or path.is_symlink()
    ]


def _places(site_packages: Path | None) -> Iterator[tuple[Kind, Path]]:
    # the .pth first: without its module it would complain at every start
    for file in reversed(hook_files(None if site_packages is None else str(site_packages))):
        yield "start_hook", file
    yield "build_cache", _caches() / "m3-plugin"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or _caches() / "vllm").expanduser()
    for file in sorted((root / "modelinfos").glob("m3_vllm-*.json")):
        yield "model_info", file


def _caches() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) if base else Path.home() / ".cache"


def remove(leftover: Leftover) -> None:
    """Delete it; of a link the link alone.

    Raises
    ------
    OSError : it cannot be deleted.
    """
    path = leftover.path
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _short(path: Path) -> str:
    """`path` as seen from the current folder, if it lies inside: half the length in a table."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def examine_leftovers(report: Report) -> None:
    """Name them in a note, so that nobody learns of them by chance."""
    found = find_leftovers()
    if found:
        report.add(
            "plugin",
            "leftovers",
            "pip uninstall would leave: " + ", ".join(_short(leftover.path) for leftover in found),
            status="note",
            advice="before you uninstall: m3-plugin uninstall-leftovers",
        )
