"""`m3-plugin doctor`: would MiniMax-M3 be served by the plugin here, and if not, why not?"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from m3_plugin.diagnosis import Report

_MARKS = {
    "ok": "[green]ok[/]",
    "note": "note",
    "warning": "[yellow]warn[/]",
    "failure": "[red]FAIL[/]",
}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Also look at a checkpoint: a folder, or an id.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="vllm or sglang; every installed one by default.")
    ] = None,
    device_type: Annotated[
        str | None,
        typer.Option("--device", help="cuda or cpu: what shall serve; a GPU if there is one."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for a bug report: no secrets in it.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds one host may take to answer.")
    ] = 300,
) -> None:
    """Find out whether MiniMax-M3 would be served by the plugin here; exit 0 only if so."""
    from m3_plugin.diagnosis import device, hosts
    from m3_plugin.diagnosis.model import examine_model

    if host is not None and host not in hosts.HOSTS:
        raise typer.BadParameter(
            f"must be one of {', '.join(hosts.HOSTS)}; got {host!r}", param_hint="--host"
        )
    if device_type not in (None, "cuda", "cpu"):
        raise typer.BadParameter(f"must be cuda or cpu; got {device_type!r}", param_hint="--device")
    report = Report()
    with Progress(
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("environment", total=None)
        hosts.examine_settings(report)
        if model is not None:
            progress.update(task, description="checkpoint")
            examine_model(report, model)
        progress.update(task, description="device and kernels")
        device.examine(report, device_type, timeout_s=timeout_s)
        progress.update(task, description="loading plugins as the host does")
        hosts.examine_hosts(report, host, timeout_s=timeout_s)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        _print(report)
    raise typer.Exit(0 if report.ok else 1)


def _print(report: Report) -> None:
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=120)
    table = Table(title="m3-plugin doctor", show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    section = None
    for finding in report.findings:
        if finding.section != section and section is not None:
            table.add_section()
        value = Text(finding.value)
        if finding.advice:
            value.append(f"\n-> {finding.advice}", style="cyan")
        shown = finding.section if finding.section != section else ""
        table.add_row(shown, _MARKS[finding.status], finding.name, value)
        section = finding.section
    console.print(table)
    if report.ok:
        console.print("MiniMax-M3 would be served by m3-plugin here.", style="green")
    else:
        console.print("MiniMax-M3 would NOT be served by m3-plugin here.", style="bold red")
