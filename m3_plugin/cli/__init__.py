"""`m3-plugin`: the command line. Every command imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from m3_plugin import __version__
from m3_plugin.cli import help as texts
from m3_plugin.cli.bench import bench_cpu, bench_kernels, bench_serve
from m3_plugin.cli.blocks import blocks
from m3_plugin.cli.check import check
from m3_plugin.cli.demo import demo
from m3_plugin.cli.doctor import doctor
from m3_plugin.cli.evaluate.needle import needle
from m3_plugin.cli.fit import fit_command
from m3_plugin.cli.leftovers import uninstall_leftovers
from m3_plugin.cli.soak import soak
from m3_plugin.cli.tiny import tiny


def _group(summary: str) -> typer.Typer:
    return typer.Typer(
        cls=texts.Group,
        help=summary,
        no_args_is_help=True,
        context_settings=dict(texts.SETTINGS),
        pretty_exceptions_show_locals=False,
    )


def _add(group: typer.Typer, words: str, command: Callable[..., Any]) -> None:
    notes = texts.NOTES[words]
    group.command(
        words.split()[-1],
        cls=texts.Command,
        context_settings=dict(texts.SETTINGS),
        short_help=notes.summary,
        epilog=notes.text(),
    )(command)


app = _group(
    "MiniMax-M3 and its block-sparse attention for a vLLM or SGLang that you already have.\n\n"
    "First hour: doctor, fit, the command that fit prints, check, eval needle."
)
evaluate_app = _group("Is a running server right? Ask it what is known.")
bench_app = _group("How fast are a server and the kernels?")

_add(app, "doctor", doctor)
_add(app, "fit", fit_command)
_add(app, "check", check)
app.add_typer(evaluate_app, name="eval")
_add(evaluate_app, "eval needle", needle)
_add(app, "soak", soak)
app.add_typer(bench_app, name="bench")
_add(bench_app, "bench serve", bench_serve)
_add(bench_app, "bench kernels", bench_kernels)
_add(bench_app, "bench cpu", bench_cpu)
_add(app, "demo", demo)
_add(app, "tiny", tiny)
_add(app, "blocks", blocks)
_add(app, "uninstall-leftovers", uninstall_leftovers)


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
    """Commands around MiniMax-M3 on vLLM and SGLang."""


@evaluate_app.callback()
def _about_eval() -> None:
    """Is a running server right? Ask it what is known."""


@bench_app.callback()
def _about_bench() -> None:
    """How fast are a server and the kernels?"""
