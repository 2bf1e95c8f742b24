"""`m3-plugin uninstall-leftovers`: what `pip uninstall m3-plugin` would leave behind."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from m3_plugin.cli.exits import environment
from m3_plugin.cli.options import JsonOption, OutputOption
from m3_plugin.cli.outputs import deliver


def uninstall_leftovers(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove what is listed.")] = False,
    as_json: JsonOption = False,
    output: OutputOption = None,
) -> None:
    """Remove what `pip uninstall m3-plugin` leaves behind. Lists it first; removes with --yes.

    Run it before pip uninstall, which removes this command too.
    """
    from m3_plugin.diagnosis.leftovers import find_leftovers, remove

    found = find_leftovers()
    if yes:
        for leftover in found:
            with environment(OSError):
                remove(leftover)
    body: dict[str, Any] = {
        "removed": yes,
        "leftovers": [
            {"id": leftover.kind, "path": str(leftover.path), "what": leftover.what}
            for leftover in found
        ],
    }
    if not as_json:
        _print(body)
    deliver("uninstall-leftovers", body, as_json=as_json, output=output)


def _print(body: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not body["leftovers"]:
        console.print("nothing is left outside m3-plugin's own packages")
    for entry in body["leftovers"]:
        verb = "removed" if body["removed"] else "found"
        console.print(f"{verb} {entry['path']}: {entry['what']}", markup=False)
    done = body["removed"] or not body["leftovers"]
    following = "pip uninstall m3-plugin" if done else "m3-plugin uninstall-leftovers --yes"
    console.print(f"next: {following}")
