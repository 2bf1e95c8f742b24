"""Options that mean the same in every command, refused at the start if they cannot be met."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from m3_plugin.cli.exits import Exit, fail


class Framework(StrEnum):
    """The hosts, by their short names."""

    vllm = "vllm"
    sglang = "sglang"


class Device(StrEnum):
    """What kernels run on."""

    cuda = "cuda"
    cpu = "cpu"


def in_a_folder(target: Path | None) -> Path | None:
    """The target itself.

    Raises
    ------
    typer.BadParameter : its folder is not there, or it is a folder itself.
    """
    if target is None:
        return None
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {target.parent} to write {target.name} into")
    if target.is_dir():
        raise typer.BadParameter(f"{target} is a folder; name a file in it")
    return target


def _picture(target: Path | None) -> Path | None:
    if target is not None and find_spec("matplotlib") is None:
        fail("--plot needs matplotlib: pip install matplotlib", Exit.ENVIRONMENT)
    return in_a_folder(target)


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write the JSON to this file too.", callback=in_a_folder),
]
KeptOutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Keep the JSON in this file as it grows; if it exists, go on with it.",
        callback=in_a_folder,
    ),
]
LogOption = Annotated[
    Path | None,
    typer.Option("--log", help="Keep the started server's log in this file.", callback=in_a_folder),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the results into this file (PNG).", callback=_picture),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="OPENAI_API_KEY",
        help="With --url: the server's key, if it wants one; safer in the variable.",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        help="The server you run, http://host:port. Default: a tiny M3 is served on this machine."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="The name under which the server has the model. Default: its first."),
]
FrameworkOption = Annotated[
    Framework | None,
    # --host is what these commands called it first; to a server it means an address
    typer.Option("--framework", "--host", help="Which one; default: the one that is installed."),
]
