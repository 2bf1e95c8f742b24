"""`m3-plugin bench serve`: a server's times against context, measured by the host's own client."""

from __future__ import annotations

import csv
import json
import re
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
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
)
from m3_plugin.cli.exits import environment
from m3_plugin.cli.host_metrics import exposition, settled, total
from m3_plugin.cli.hosts import (
    HOSTS,
    MAX_MODEL_LEN,
    MODEL_NAME,
    Host,
    host_to_start,
    installed_host,
)
from m3_plugin.cli.options import (
    ApiKeyOption,
    FrameworkOption,
    JsonOption,
    OutputOption,
    PlotOption,
    in_a_folder,
)
from m3_plugin.cli.outputs import deliver
from m3_plugin.host.children import child_environment, python
from m3_plugin.host.serving import ServerFailed, ServerProcess, free_port, terminate_as_exit
from m3_plugin.model.released import misnamed_model

# The `vllm` script looks up a distribution of that name, which the CPU build does not have.
_VLLM_CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_MISSING_MODULE = re.compile(r"No module named '(\w+)'")
_OURS, _UNKNOWN = "m3-plugin", "server"
_COLOURS = {
    _OURS: "tab:blue",
    _UNKNOWN: "tab:green",
    "pure host": "tab:orange",
    "dense": "tab:gray",
}


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
    """One load on one server, as the host's client counted it. Times are medians over requests.

    Attributes
    ----------
    step_ms : mean time per token, as the server itself counted it
    store_ms, select_ms, attend_ms : what all MSA layers together took of a decode step on one rank,
        as the server counted it, on average: storing keys, selecting blocks, attending
    msa_share : these three over `step_ms`; None, as they are, where the server does not count them
    dense_ms : what all dense layers took, where our kernel serves them
    """

    server: str
    context: int
    output_tokens: int
    requests: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float
    p99_tpot_ms: float
    output_tokens_per_s: float
    step_ms: float | None = None
    store_ms: float | None = None
    select_ms: float | None = None
    attend_ms: float | None = None
    msa_share: float | None = None
    dense_ms: float | None = None


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
    api_key: str | None = field(default=None, repr=False)


class ClientFailed(RuntimeError):
    """The host's client ended without a result; the message is the end of what it said."""


def bench_serve(
    url: Annotated[
        str | None,
        typer.Option(help="A server you run, http://host:port; default: start small ones here."),
    ] = None,
    framework: FrameworkOption = None,
    model: Annotated[
        str | None, typer.Option(help="With --url: the name under which the server has the model.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="With --url: the tokenizer, as a checkpoint folder or a repository id."),
    ] = None,
    api_key: ApiKeyOption = None,
    against: Annotated[
        Against,
        typer.Option(
            help="Without --url, measure a second server too: host: without the plugin; dense: the "
            "model without sparse layers; auto: the first of these that starts."
        ),
    ] = Against.auto,
    contexts: Annotated[
        str, typer.Option(help="Lengths of the prompts in tokens, with commas.")
    ] = "1024,4096",
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Requests per context.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    as_json: JsonOption = False,
    output: OutputOption = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="Write the rows to this file as CSV.", callback=in_a_folder),
    ] = None,
    plot: PlotOption = None,
) -> None:
    """How fast is a server? Time to the first token and per token, by length of the prompt.

    The requests are sent by the host's own client: `vllm bench serve` or `sglang.bench_serving`.
    """
    console = Console(stderr=True)
    loads = [
        Load(context, output_tokens, requests, concurrency)
        for context in numbers(contexts, "--contexts")
    ]
    if not loads:
        raise typer.BadParameter("at least one context is needed", param_hint="--contexts")
    longest = max(load.context + load.output_tokens for load in loads)
    if url is None and longest > MAX_MODEL_LEN - 64:
        raise typer.BadParameter(
            f"the servers started here have room for {MAX_MODEL_LEN - 64} tokens, answers "
            f"included; got {longest}. Start your own and give its --url",
            param_hint="--contexts",
        )
    with environment(LookupError, ServerFailed, ClientFailed):
        chosen = installed_host(framework) if url else host_to_start(framework)
        report = ServeReport(machine_facts(), client=chosen.title, model=model or MODEL_NAME)
        if url is not None:
            if model is None or tokenizer is None:
                raise typer.BadParameter("--model and --tokenizer are needed with --url")
            if (misnamed := misnamed_model(["--model", tokenizer])) is not None:
                raise typer.BadParameter(misnamed, param_hint="--tokenizer")
            address = url.rstrip("/").removesuffix("/v1")
            ours = "m3_plugin:info{" in exposition(address)
            name = _OURS if ours else _UNKNOWN
            served = Server(name, address, model, tokenizer, api_key=api_key)
            report.rows += measure(served, loads, host=chosen)
        else:
            _measure_started(report, chosen, loads, against=against, console=console)
        report.left_out |= _unknown_shares(report.rows)
    report.load_average_after = load_average()
    if not as_json:
        _print(report, Console())
    deliver("bench-serve", asdict(report), as_json=as_json, output=output)
    if plot is not None:
        _plot(report, plot)
        console.print(f"picture: {plot}", markup=False)
    if csv_file is not None:
        write_csv(report.rows, csv_file)


def measure(server: Server, loads: list[Load], *, host: Host) -> list[Row]:
    """Put every load on a server, one after the other, and ask it what its layers took.

    A first request of the longest context is not counted: some kernels are built when they are
    first needed. The client's own warm-up would ask the first prompt twice, and measure the second
    time how fast a prefix cache answers.

    Raises
    ------
    ClientFailed : the host's client gave no result.
    """
    warm_up = replace(max(loads, key=lambda load: load.context), requests=1)
    rows = []
    with progress_bar() as progress:
        task = progress.add_task(f"{server.name}: warming up", total=len(loads) + 1)
        before = read_decoding(server.url, host=host)
        for load in (warm_up, *loads):
            if load is not warm_up:
                progress.update(task, description=f"{server.name} at {load.context:,}")
            row = run_client(server, load, host=host)
            finished = before.requests + load.requests
            after = settled(
                lambda: read_decoding(server.url, host=host),
                lambda now, finished=finished: now.requests >= finished,
            )
            rows.append(with_attention(row, before, after))
            before = after
            progress.advance(task)
    return rows[1:]


@dataclass(frozen=True)
class Decoding:
    """A server's counters of decoding up to now; 0 where it does not count.

    Attributes
    ----------
    requests, token_seconds : finished requests, and their mean times per token added up
    drafts : verified chains of drafts
    steps : decode steps, added up over ranks
    store, select, attend : seconds of MSA layers in them, added up over ranks
    dense : seconds of dense layers on our kernel, alike
    """

    requests: float
    token_seconds: float
    drafts: float
    steps: float
    store: float
    select: float
    attend: float
    dense: float

    def since(self, before: Decoding) -> Decoding:
        """What came after `before`."""
        names = [counter.name for counter in fields(self)]
        return Decoding(**{name: getattr(self, name) - getattr(before, name) for name in names})


def read_decoding(url: str, *, host: Host) -> Decoding:
    """The counters of a running server."""
    text = exposition(url)
    time_per_token = f"{host.metrics}:request_time_per_output_token_seconds"
    phase = 'phase="decode"'

    def seconds(part: str) -> float:
        # prometheus_client orders labels by name
        return total(text, "m3_plugin:msa_seconds_total", label=f'part="{part}",{phase}')

    return Decoding(
        requests=total(text, f"{time_per_token}_count"),
        token_seconds=total(text, f"{time_per_token}_sum"),
        drafts=total(text, host.draft_counters.steps),
        steps=total(text, "m3_plugin:msa_steps_total", label=phase),
        store=seconds("store"),
        select=seconds("select"),
        attend=seconds("attend"),
        dense=total(text, "m3_plugin:dense_seconds_total", label=phase),
    )


def with_attention(row: Row, before: Decoding, after: Decoding) -> Row:
    """The row with what the server counted between two looks at it.

    Only where a decode step yields one token per request: with drafts it does not.
    """
    counted = after.since(before)
    if not counted.requests or not counted.steps or counted.drafts:
        return row
    per_token = 1e3 * counted.token_seconds / counted.requests
    parts = [1e3 * part / counted.steps for part in (counted.store, counted.select, counted.attend)]
    store, select, attend = parts
    return replace(
        row,
        step_ms=per_token,
        store_ms=store,
        select_ms=select,
        attend_ms=attend,
        msa_share=sum(parts) / per_token,
        dense_ms=1e3 * counted.dense / counted.steps if counted.dense else None,
    )


def run_client(server: Server, load: Load, *, host: Host) -> Row:
    """One run of the host's client.

    Raises
    ------
    ClientFailed : no result, or fewer requests completed than were asked.
    """
    command = {HOSTS["vllm"].title: _vllm_client, HOSTS["sglang"].title: _sglang_client}[host.title]
    with tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder:
        result = Path(folder) / "result.json"
        with terminate_as_exit():
            done = subprocess.run(
                command(server, load, result),
                capture_output=True,
                text=True,
                check=False,
                # both clients read the key from here, where no list of processes shows it
                env=child_environment({"OPENAI_API_KEY": server.api_key} if server.api_key else {}),
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
        *python("-c", _VLLM_CLIENT),
        *("--backend", "openai", "--base-url", server.url),
        *("--model", server.model, "--tokenizer", server.tokenizer),
        *("--dataset-name", "random", "--random-range-ratio", "0"),
        *("--random-input-len", str(load.context), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--num-warmups", "0", "--ready-check-timeout-sec", "0", *_new_seed()),
        *("--ignore-eos", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def _sglang_client(server: Server, load: Load, result: Path) -> list[str]:
    return [
        *python("-m", "sglang.bench_serving"),
        *("--backend", "sglang-oai", "--base-url", server.url),
        *("--model", server.tokenizer, "--served-model-name", server.model),
        *("--tokenizer", server.tokenizer),
        *("--dataset-name", "random-ids", "--random-range-ratio", "1"),
        *("--random-input-len", str(load.context), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--warmup-requests", "0", *_new_seed()),
        *("--disable-tqdm", "--output-file", str(result)),
    ]


def _new_seed() -> tuple[str, str]:
    """Prompts of their own for every run: with one seed, long prompts begin as short ones do."""
    return "--seed", str(secrets.randbelow(2**31))


def _measure_started(
    report: ServeReport, host: Host, loads: list[Load], *, against: Against, console: Console
) -> None:
    """Ours, then the peer, on the constructed checkpoint; the random tokens find no facts in it."""
    with _started(host, dense=False, console=console) as server:
        report.rows += measure(server(_OURS), loads, host=host)
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
            report.left_out[name] = failure.reason
            console.print(f"{name} left out: {report.left_out[name]}", markup=False)


@contextmanager
def _started(
    host: Host, *, dense: bool, console: Console, pure: bool = False
) -> Iterator[Callable[[str], Server]]:
    """A server for the constructed checkpoint; yields what names it in a report."""
    from m3_plugin.testing.constructed import ConstructedCheckpoint

    with tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder:
        scratch = Path(folder)
        with console.status("writing the constructed checkpoint"):
            checkpoint = ConstructedCheckpoint(use_sparse_attention=not dense).write(
                scratch / "checkpoint"
            )
        port = free_port()
        measured = {"M3_PLUGIN_STATISTICS": "0", "M3_PLUGIN_TIMINGS": "1"}
        environment = dict(host.environment(scratch)) | measured
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
                server.wait_until_ready()
            yield lambda name: Server(name, server.url, MODEL_NAME, str(checkpoint))


def _unknown_shares(rows: list[Row]) -> dict[str, str]:
    """Per server without times of its MSA layers: why there are none."""
    unknown = {row.server for row in rows if row.msa_share is None}
    return {
        f"attention's share on {name}": "its /metrics do not have m3_plugin:msa_seconds_total: "
        "start it with M3_PLUGIN_TIMINGS=1 and metrics of workers (docs/operations.md), on a CPU"
        if name in (_OURS, _UNKNOWN)
        else "attention there is the host's own, which exports no times"
        for name in sorted(unknown)
    }


def write_csv(rows: list[Row], path: Path) -> None:
    """One line per row, with a header."""
    names = [column.name for column in fields(Row)]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def _print(report: ServeReport, console: Console) -> None:
    # a pipe or a log has no width of its own, and a narrow table cannot be read
    console = console if console.is_terminal else Console(width=120)
    table = Table(title=f"{report.model}, measured by {report.client}'s client")
    for heading in ("context", "server", "first token", "per token", "p99", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    table.add_column("selecting | attending\nof a decode step", justify="right")
    table.add_column("share of\nMSA", justify="right")
    for row in sorted(report.rows, key=lambda row: row.context):
        parts, share = "-", "-"
        if row.select_ms is not None and row.attend_ms is not None and row.msa_share is not None:
            parts = f"{short(row.select_ms)} | {short(row.attend_ms)} ms"
            share = f"{row.msa_share:.1%}"
        table.add_row(
            f"{row.context:,}",
            row.server,
            f"{short(row.ttft_ms)} ms",
            f"{short(row.tpot_ms)} ms",
            f"{short(row.p99_tpot_ms)} ms",
            short(row.output_tokens_per_s),
            parts,
            share,
        )
    console.print(table)
    for name, reason in report.left_out.items():
        console.print(f"{name} left out: {reason}", markup=False)


def _plot(report: ServeReport, path: Path) -> None:
    rows = sorted(report.rows, key=lambda row: row.context)
    names = list(dict.fromkeys(row.server for row in rows))

    def curves(
        value: Callable[[Row], float | None], *, label: str = "", line: str = "o-"
    ) -> tuple[Curve, ...]:
        drawn = []
        for name in names:
            values = [(row.context, value(row)) for row in rows if row.server == name]
            points = tuple((at, y, y, y) for at, y in values if y is not None)
            if points:
                drawn.append(Curve(f"{name}{label}", _COLOURS[name], points, line))
        return tuple(drawn)

    def selecting(row: Row) -> float | None:
        return row.select_ms / row.step_ms if row.select_ms and row.step_ms else None

    whole = curves(lambda row: row.msa_share, label=", MSA layers")
    share = Panel(
        "decode: share of MSA attention in the time per token",
        (*whole, *curves(selecting, label=", selecting blocks", line="o--")),
        share=True,
    )
    plot_panels(
        [
            Panel("decode: time per token", curves(lambda row: row.tpot_ms)),
            Panel("prefill: time to first token", curves(lambda row: row.ttft_ms)),
            *([share] if whole else []),
        ],
        path,
        title=f"{report.model} on {report.client}, {report.machine['cpu']}, "
        f"commit {report.machine['commit']}",
        unit="ms, median over requests",
    )
