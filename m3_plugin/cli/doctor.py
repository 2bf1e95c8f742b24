"""`m3-plugin doctor`: would a host here hand MiniMax-M3 to the plugin, and if not, why not?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from m3_plugin.cli.exits import Exit
from m3_plugin.cli.options import Device, Framework, JsonOption, OutputOption
from m3_plugin.cli.outputs import deliver
from m3_plugin.diagnosis import Report

if TYPE_CHECKING:
    from m3_plugin.diagnosis.memory import Ranks

_MARKS = {
    "ok": "[green]ok[/]",
    "note": "note",
    "warning": "[yellow]warn[/]",
    "failure": "[red]FAIL[/]",
}
_SUGGESTED = "MiniMaxAI/MiniMax-M3-MXFP8"


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint to look at too, and at its room in memory: folder or id."),
    ] = None,
    framework: Annotated[
        Framework | None,
        # as FrameworkOption, but for the default
        typer.Option("--framework", "--host", help="Which one; default: all that are installed."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="What a server would run on; default: cuda if there is a GPU, else cpu."),
    ] = None,
    as_json: JsonOption = False,
    output: OutputOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds that one host may take to answer.")
    ] = 300,
) -> None:
    """Would vLLM or SGLang hand MiniMax-M3 to m3-plugin here? If not, why not?

    Looks at variables, hosts, devices, kernels and, with --model, at a checkpoint. Loads no
    weights, starts no server, uses no network. Read the report before you send it to anybody.
    """
    from m3_plugin.diagnosis import device as devices
    from m3_plugin.diagnosis import hosts
    from m3_plugin.diagnosis.leftovers import examine_leftovers
    from m3_plugin.diagnosis.memory import examine_memory
    from m3_plugin.diagnosis.model import examine_model

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
        examine_leftovers(report)
        progress.update(task, description="device and kernels")
        found = devices.examine(report, device and device.value, timeout_s=timeout_s)
        ranks = None
        if model is not None:
            progress.update(task, description="checkpoint")
            config = examine_model(report, model)
            if config is not None and found is not None:
                ranks = examine_memory(report, model, config, found)
        progress.update(task, description="loading plugins as the host does")
        hosts.examine_hosts(report, framework and framework.value, timeout_s=timeout_s)
    following = next_command(report, model=model, ranks=ranks)
    if not as_json:
        _print(report, following)
    deliver("doctor", report.as_dict() | {"next": following}, as_json=as_json, output=output)
    raise typer.Exit(Exit.of(report.ok))


def next_command(report: Report, *, model: str | None, ranks: Ranks | None) -> str:
    """What to type after reading the report."""
    again = "m3-plugin doctor" + (f" --model {model}" if model else "")
    if not report.ok:
        return again
    if model is None:
        on_gpu = any(finding.id.startswith("gpu.") for finding in report.findings)
        return f"m3-plugin doctor --model {_SUGGESTED}" if on_gpu else "m3-plugin demo"
    has_room = any(f.id == "model.memory" and f.status == "ok" for f in report.findings)
    options = ranks.options if ranks is not None and has_room else "--gpu H200 --tp 8"
    return f"m3-plugin fit --model {model} {options}"


def _print(report: Report, following: str) -> None:
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
    failures = sum(finding.status == "failure" for finding in report.findings)
    warnings = sum(finding.status == "warning" for finding in report.findings)
    if report.ok:
        console.print(
            "m3-plugin is registered for MiniMax-M3 here. No weights were loaded"
            + (f"; read the {warnings} warning(s)." if warnings else "."),
            style="green",
        )
        label = "next: "
    else:
        console.print(
            f"m3-plugin would NOT serve MiniMax-M3 here: {failures} FAIL above.", style="bold red"
        )
        label = "next: do what the arrows say, then "
    console.print(f"{label}{following}", markup=False, highlight=False, soft_wrap=True)
