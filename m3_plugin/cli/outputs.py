"""The JSON of a command: one envelope for all, on stdout and in files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from m3_plugin import __version__

SCHEMAS = Path(__file__).parent / "schemas"


def envelope(command: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it leaves the command.

    Parameters
    ----------
    command : its words joined by dashes, "bench-cpu"; `schemas/<command>.json` describes the body

    Returns
    -------
    dict : `schema` and `version` first; numbers that JSON cannot hold (NaN, infinities) are null
    """
    head = {"schema": f"m3-plugin/{command}/1", "version": __version__}
    return head | {name: _finite(value) for name, value in body.items()}


def deliver(
    command: str, body: Mapping[str, Any], *, as_json: bool, output: Path | None = None
) -> None:
    """Print and write what was asked for.

    Parameters
    ----------
    command, body : as for `envelope`
    as_json : on stdout, where then nothing else may be
    output : a file
    """
    text = json.dumps(envelope(command, body), indent=1, allow_nan=False)
    if as_json:
        typer.echo(text)
    if output is not None:
        output.write_text(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
