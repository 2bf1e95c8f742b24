"""`m3-plugin`: the command line. Every command imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from m3_plugin import __version__
from m3_plugin.cli import bench, evaluate
from m3_plugin.cli.blocks import blocks
from m3_plugin.cli.check import check
from m3_plugin.cli.demo import demo
from m3_plugin.cli.doctor import doctor
from m3_plugin.cli.fit import fit_command
from m3_plugin.cli.tiny import tiny

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="MiniMax-M3 and its block-sparse attention for an existing vLLM or SGLang.",
)
app.command()(check)
app.command()(blocks)
app.command()(demo)
app.command()(doctor)
app.command("fit")(fit_command)
app.command()(tiny)
app.add_typer(evaluate.app, name="eval", help="Ask a server questions with known answers.")
app.add_typer(bench.app, name="bench", help="Measure kernels and servers on this machine.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"m3-plugin {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
) -> None:
    """MiniMax-M3 and its block-sparse attention for an existing vLLM or SGLang."""
