"""`m3-plugin eval`: does a served model find what it was told?"""

from __future__ import annotations

import typer

from m3_plugin.cli.evaluate.needle import needle

app = typer.Typer(no_args_is_help=True, help="Ask a server questions with known answers.")
app.command("needle")(needle)


@app.callback()
def evaluate() -> None:
    """Ask a server questions with known answers."""
