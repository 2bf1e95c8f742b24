"""Files a command writes at its end, refused at its start if they could not be written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeVar

import typer

_Target = TypeVar("_Target", str, Path)


def in_a_folder(target: _Target | None) -> _Target | None:
    """The target itself; "-" is stdout.

    Raises
    ------
    typer.BadParameter : its folder is not there, or it is a folder itself.
    """
    if target is None or str(target) == "-":
        return target
    path = Path(target)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file in it")
    return target


def _picture(target: Path | None) -> Path | None:
    if target is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed: pip install matplotlib")
    return in_a_folder(target)


JsonOption = Annotated[
    str | None,
    typer.Option("--json", help="Write the results as JSON; - for stdout.", callback=in_a_folder),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Write a picture (needs matplotlib).", callback=_picture),
]
