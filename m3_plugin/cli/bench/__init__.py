"""`m3-plugin bench`: speed on this machine, never of a result that was not checked first."""

from __future__ import annotations

import typer

from m3_plugin.cli.bench.cpu import bench_cpu
from m3_plugin.cli.bench.kernels import bench_kernels
from m3_plugin.cli.bench.serve import bench_serve

app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")
app.command("cpu")(bench_cpu)
app.command("kernels")(bench_kernels)
app.command("serve")(bench_serve)


@app.callback()
def bench() -> None:
    """Measure the kernels on this machine."""
