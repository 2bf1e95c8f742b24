"""`m3-plugin bench serve`: a server's times against context, measured by the host's own client."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from m3_plugin.cli.bench.report import (
    Curve,
    Panel,
    load_average,
    machine_facts,
    numbers,
    plot_panels,
    progress_bar,
    short,
    write_json,
)
from m3_plugin.cli.hosts import HOSTS, MAX_MODEL_LEN, MODEL_NAME, Host, installed_host
from m3_plugin.cli.outputs import JsonOption, PlotOption, in_a_folder
from m3_plugin.serving import ServerFailed, ServerProcess, free_port

# The `vllm` script looks up a distribution of that name, which the CPU build does not have.
_VLLM_CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .+")
_MISSING_MODULE = re.compile(r"No module named '(\w+)'")
_COLOURS = {"m3-plugin": "tab:blue", "pure host": "tab:orange", "dense": "tab:gray"}


class Against(StrEnum):
    """What to compare with, on a server that is started here."""

    auto = "auto"
    host = "host"
    dense = "dense"
    none = "none"


@dataclass(frozen=True)
class Load:
    """What the client asks: `requests` prompts of random tokens, `concurrency` of them at once."""

    context: int
    output_tokens: int
    requests: int
    concurrency: int


@dataclass(frozen=True)
class Row:
    """One load on one server, as the host's client counted it. Times are medians over requests."""

    server: str
    context: int
    output_tokens: int
    requests: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float
    p99_tpot_ms: float
    output_tokens_per_s: float


@dataclass
class ServeReport:
    """Everything a reader needs to judge the numbers."""

    machine: dict[str, Any]
    client: str
    model: str
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    load_average_after: list[float] | None = None


@dataclass(frozen=True)
class Server:
    """A server to be measured: its name in the report, and how to reach and to name the model."""

    name: str
    url: str
    model: str
    tokenizer: str


class ClientFailed(RuntimeError):
    """The host's client ended without a result; the message is the end of what it said."""


def bench_serve(
    url: Annotated[
        str | None, typer.Option(help="A running server; by default small ones are started.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="vllm or sglang: whose client.")] = None,
    model: Annotated[str | None, typer.Option(help="With --url: name of the served model.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With --url: checkpoint folder or id of its tokenizer.")
    ] = None,
    against: Annotated[
        Against, typer.Option(help="Without --url: the host alone, else the model made dense.")
    ] = Against.auto,
    contexts: Annotated[str, typer.Option(help="Prompt tokens, with commas.")] = "1024,4096",
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Requests per context.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    json_file: JsonOption = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the rows as CSV.", callback=in_a_folder)
    ] = None,
    plot: PlotOption = None,
) -> None:
    """Times per token against context, with `vllm bench serve` or `sglang.bench_serving`."""
    console = Console(stderr=True)
    loads = [
        Load(context, output_tokens, requests, concurrency)
        for context in numbers(contexts, "--contexts")
    ]
    if not loads:
        raise typer.BadParameter("at least one context is needed", param_hint="--contexts")
    try:
        chosen = installed_host(host)
        report = ServeReport(machine_facts(), client=chosen.title, model=model or MODEL_NAME)
        if url is not None:
            if model is None or tokenizer is None:
                raise typer.BadParameter("--model and --tokenizer are needed with --url")
            served = Server("m3-plugin", url.rstrip("/").removesuffix("/v1"), model, tokenizer)
            report.rows += measure(served, loads, host=chosen)
        else:
            _measure_started(report, chosen, loads, against=against, console=console)
    except (LookupError, ServerFailed, ClientFailed) as failure:
        console.print(str(failure), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    report.load_average_after = load_average()
    _print(report, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(report, json_file)
    if csv_file is not None:
        write_csv(report.rows, csv_file)
    if plot is not None:
        _plot(report, plot)


def measure(server: Server, loads: list[Load], *, host: Host) -> list[Row]:
    """Put every load on a server, one after the other.

    Raises
    ------
    ClientFailed : the host's client gave no result.
    """
    rows = []
    with progress_bar() as progress:
        task = progress.add_task(server.name, total=len(loads))
        for load in loads:
            progress.update(task, description=f"{server.name} at {load.context:,}")
            rows.append(run_client(server, load, host=host))
            progress.advance(task)
    return rows


def run_client(server: Server, load: Load, *, host: Host) -> Row:
    """One run of the host's client.

    Raises
    ------
    ClientFailed : no result, or fewer requests completed than were asked.
    """
    command = {HOSTS["vllm"].title: _vllm_client, HOSTS["sglang"].title: _sglang_client}[host.title]
    with tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            command(server, load, result), capture_output=True, text=True, check=False
        )
        if done.returncode or not result.exists():
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            missing = _MISSING_MODULE.search(tail)
            advice = (
                f"\nInstall it beside {host.title}: pip install {missing[1]}" if missing else ""
            )
            raise ClientFailed(
                f"{host.title}'s client ended with {done.returncode}:\n{tail}{advice}"
            )
        found = json.loads(result.read_text().splitlines()[-1])
    if found["completed"] != load.requests:
        raise ClientFailed(
            f"{load.requests - found['completed']} of {load.requests} requests of {load.context:,} "
            f"tokens failed on {server.url}; its log says why"
        )
    return Row(
        server=server.name,
        context=load.context,
        output_tokens=load.output_tokens,
        requests=load.requests,
        concurrency=load.concurrency,
        ttft_ms=found["median_ttft_ms"],
        tpot_ms=found["median_tpot_ms"],
        p99_tpot_ms=found["p99_tpot_ms"],
        output_tokens_per_s=found["output_throughput"],
    )


def _vllm_client(server: Server, load: Load, result: Path) -> list[str]:
    return [
        *(sys.executable, "-c", _VLLM_CLIENT),
        *("--backend", "openai", "--base-url", server.url),
        *("--model", server.model, "--tokenizer", server.tokenizer),
        *("--dataset-name", "random", "--random-range-ratio", "0"),
        *("--random-input-len", str(load.context), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--num-warmups", "1", "--ignore-eos", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def _sglang_client(server: Server, load: Load, result: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "sglang.bench_serving"),
        *("--backend", "sglang-oai", "--base-url", server.url),
        *("--model", server.tokenizer, "--served-model-name", server.model),
        *("--tokenizer", server.tokenizer),
        *("--dataset-name", "random-ids", "--random-range-ratio", "1"),
        *("--random-input-len", str(load.context), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--disable-tqdm", "--output-file", str(result)),
    ]


def _measure_started(
    report: ServeReport, host: Host, loads: list[Load], *, against: Against, console: Console
) -> None:
    """Ours, then the peer, on the constructed checkpoint; the random tokens find no facts in it."""
    longest = max(load.context + load.output_tokens for load in loads)
    if longest > MAX_MODEL_LEN - 64:
        raise ServerFailed(
            f"--contexts must leave room within {MAX_MODEL_LEN - 64} tokens on the servers started "
            f"here; got {longest}. Start your own and give its --url"
        )
    with _started(host, dense=False, console=console) as server:
        report.rows += measure(server("m3-plugin"), loads, host=host)
    peers: dict[str, Callable[[], Any]] = {}
    if against in (Against.auto, Against.host):
        peers["pure host"] = lambda: _started(host, dense=False, pure=True, console=console)
    if against in (Against.auto, Against.dense):
        peers["dense"] = lambda: _started(host, dense=True, console=console)
    for name, start in peers.items():
        try:
            with start() as server:
                report.rows += measure(server(name), loads, host=host)
                return
        except ServerFailed as failure:
            report.left_out[name] = _reason(str(failure))
            console.print(f"{name} left out: {report.left_out[name]}", markup=False)


def _reason(failure: str) -> str:
    """The last error a server's log names, but for those that only point at another one."""
    errors = _ERROR.findall(failure)
    causes = [error for error in errors if "root cause above" not in error]
    return (causes or errors or failure.splitlines())[-1].strip()


@contextmanager
def _started(
    host: Host, *, dense: bool, console: Console, pure: bool = False
) -> Iterator[Callable[[str], Server]]:
    """A server for the constructed checkpoint; yields what names it in a report."""
    from m3_plugin.testing.constructed import ConstructedCheckpoint

    with tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder:
        scratch = Path(folder)
        checkpoint = ConstructedCheckpoint(use_sparse_attention=not dense).write(
            scratch / "checkpoint"
        )
        port = free_port()
        environment = dict(host.environment(scratch)) | {"M3_PLUGIN_STATISTICS": "0"}
        if pure:
            environment |= {"M3_PLUGIN_DISABLE": "1", "M3_PLUGIN_REQUIRED": "0"}
        with ServerProcess(
            host.command(checkpoint, port, host.options),
            port=port,
            log=scratch / "server.log",
            environment=environment,
        ) as server:
            what = "without the plugin" if pure else "with every layer dense" if dense else ""
            with console.status(f"starting {host.title} {what}"):
                try:
                    server.wait_until_ready()
                except ServerFailed as failure:
                    # the end of a long log seldom holds what went wrong first
                    reason = _reason(server.log.read_text(errors="replace"))
                    raise ServerFailed(f"{failure}\n{reason}") from None
            yield lambda name: Server(name, server.url, MODEL_NAME, str(checkpoint))


def growing_share(rows: list[Row], server: str) -> list[tuple[int, float]]:
    """(context, share of the time per token that the shortest context does not need).

    What grows with the context is attention, so this is a lower bound of its share.
    """
    mine = sorted((row for row in rows if row.server == server), key=lambda row: row.context)
    base = mine[0].tpot_ms
    return [(row.context, max(0.0, 1 - base / row.tpot_ms)) for row in mine]


def write_csv(rows: list[Row], path: Path) -> None:
    """One line per row, with a header."""
    names = [column.name for column in fields(Row)]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def _print(report: ServeReport, console: Console) -> None:
    table = Table(title=f"{report.model}, measured by {report.client}'s client")
    for heading in ("context", "server", "first token", "per token", "p99", "tokens/s", "growing"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    growing = {
        (name, context): share
        for name in dict.fromkeys(row.server for row in report.rows)
        for context, share in growing_share(report.rows, name)
    }
    for row in sorted(report.rows, key=lambda row: row.context):
        table.add_row(
            f"{row.context:,}",
            row.server,
            f"{short(row.ttft_ms)} ms",
            f"{short(row.tpot_ms)} ms",
            f"{short(row.p99_tpot_ms)} ms",
            short(row.output_tokens_per_s),
            f"{growing[row.server, row.context]:.0%}",
        )
    console.print(table)
    for name, reason in report.left_out.items():
        console.print(f"{name} left out: {reason}", markup=False)


def _plot(report: ServeReport, path: Path) -> None:
    names = list(dict.fromkeys(row.server for row in report.rows))

    def curve(name: str, points: Iterable[tuple[int, float]]) -> Curve:
        drawn = tuple((at, value, value, value) for at, value in points)
        return Curve(label=name, colour=_COLOURS[name], points=drawn)

    def curves(value: Callable[[Row], float]) -> tuple[Curve, ...]:
        rows = sorted(report.rows, key=lambda row: row.context)
        return tuple(
            curve(name, ((row.context, value(row)) for row in rows if row.server == name))
            for name in names
        )

    plot_panels(
        [
            Panel("time per token", curves(lambda row: row.tpot_ms)),
            Panel("time to first token", curves(lambda row: row.ttft_ms)),
            Panel(
                "attention's share of the time per token, at least",
                tuple(curve(name, growing_share(report.rows, name)) for name in names),
                share=True,
            ),
        ],
        path,
        title=f"{report.model}, {report.client}, {report.machine['cpu']}",
        unit="ms",
    )
