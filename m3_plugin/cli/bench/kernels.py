"""`m3-plugin bench kernels`: the GPU kernels of one sparse layer, beside peers and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from m3_plugin.cli.bench.model import model_kernels
from m3_plugin.cli.bench.report import (
    Curve,
    GateError,
    Panel,
    gpu_facts,
    headline,
    machine_facts,
    numbers,
    plot_panels,
    progress_bar,
    short,
    table_of,
)
from m3_plugin.cli.bench.roofline import (
    Geometry,
    Workload,
    copies_beyond_cache,
    dense_work,
    floor_seconds,
    sparse_work,
)
from m3_plugin.cli.exits import Exit, fail
from m3_plugin.cli.options import JsonOption, OutputOption, PlotOption
from m3_plugin.cli.outputs import deliver

if TYPE_CHECKING:
    import torch

    from m3_kernels.testing.timing import Timing
    from m3_plugin.attention.backends import KernelChoice
    from m3_plugin.cli.bench.clocks import Clock
    from m3_plugin.cli.bench.layer import Layer, Method

OURS, OURS_INT8, DENSE = "m3-plugin", "m3-plugin int8 index", "dense sdpa"
PEERS = ("vllm", "sglang", "flashinfer")
PATTERNS = ("shared", "independent")


class ModelChip(StrEnum):
    """GPUs that the time model knows."""

    H100 = "H100"
    H200 = "H200"


# A graph of about this long makes the events around it negligible.
GRAPH_SECONDS = 2e-3
MAX_CALLS = 60
# Copies of a workload's data for all methods must leave the rest of the memory to the kernels.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best, measured in the same run.

    Attributes
    ----------
    bytes_per_second : read and written by a copy
    operations_per_second : of a large matrix product in the dtype of the run
    """

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Row:
    """One method on one workload.

    Attributes
    ----------
    part : "whole", or the step of a method that has two
    fault : why the method is wrong or cannot run; no time is taken then
    floor_us : time no implementation of the same attention can beat, None for parts
    """

    phase: str
    batch: int
    context: int
    rows: int
    pattern: str
    method: str
    part: str
    fault: str | None = None
    median_us: float | None = None
    first_quartile_us: float | None = None
    third_quartile_us: float | None = None
    minimum_us: float | None = None
    rounds: int = 0
    floor_us: float | None = None


@dataclass
class Report:
    """Everything a reader needs to judge the numbers."""

    machine: dict[str, Any]
    geometry: Geometry
    dtype: str
    limits: Limits
    peers: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def row(self, workload: Workload, method: str, part: str = "whole") -> Row | None:
        """One measurement, None if it was not made."""
        for row in self.rows:
            if (workload_of(row), row.method, row.part) == (workload, method, part):
                return row
        return None

    def speedup(self, workload: Workload, method: str) -> float | None:
        """How many times faster we are than a method; None unless both are right."""
        ours, theirs = self.row(workload, OURS), self.row(workload, method)
        if ours is None or theirs is None or ours.fault or theirs.fault:
            return None
        if not ours.median_us or not theirs.median_us:
            return None
        return theirs.median_us / ours.median_us


def workload_of(row: Row) -> Workload:
    """The workload a row belongs to."""
    return Workload(row.phase, row.batch, row.context, row.rows, row.pattern)


def bench_kernels(
    decode: Annotated[
        str,
        typer.Option(help="Decoding: requests x tokens of each, with commas; empty for none."),
    ] = "1x8192,1x32768,1x131072,1x1048576,16x32768,16x131072,64x8192,64x131072",
    verify: Annotated[
        str, typer.Option(help="Verifying 3 drafts: requests x tokens; empty for none.")
    ] = "64x131072",
    prefill: Annotated[
        str, typer.Option(help="Reading a prompt: tokens when a chunk was read; empty for none.")
    ] = "8192,32768,131072,1048576",
    prefill_rows: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt's last chunk, which is timed.")
    ] = 8192,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each method.")] = 20,
    peers: Annotated[
        str,
        typer.Option(help="Whose kernels to time too: vllm, sglang, flashinfer; empty for none."),
    ] = "vllm,sglang,flashinfer",
    peer_folder: Annotated[
        Path | None, typer.Option(help="A folder with their packages, if they are not installed.")
    ] = None,
    model: Annotated[
        ModelChip | None,
        typer.Option(help="Measure nothing: what a model expects of our kernels on such a GPU."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="With --model: figures of kernels that need not be compiled again."),
    ] = None,
    as_json: JsonOption = False,
    output: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """How fast are the GPU kernels? One sparse layer in bf16 beside other kernels.

    Each time is also compared with the least that the memory and the cores of this GPU allow.
    Results are compared first; nothing is timed that is wrong.
    """
    import torch

    workloads = [
        *(Workload("decode", b, c) for b, c in _pairs(decode, "--decode")),
        *(
            Workload("verify", b, c, rows=4, pattern=pattern)
            for b, c in _pairs(verify, "--verify")
            for pattern in PATTERNS
        ),
        *(
            Workload("prefill", 1, c, rows=prefill_rows, pattern=pattern)
            for c in numbers(prefill, "--prefill")
            for pattern in PATTERNS
        ),
    ]
    if any(workload.rows > workload.context for workload in workloads):
        raise typer.BadParameter("a context is shorter than its rows", param_hint="--prefill-rows")
    wanted = [name.strip() for name in peers.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - set(PEERS)):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}", param_hint="--peers")
    if model is not None:
        model_kernels(model.value, workloads, record=record, as_json=as_json, output=output)
        return
    if not torch.cuda.is_available():
        fail(
            f"bench kernels needs a CUDA device, and torch {torch.__version__} sees none. "
            "For the CPU kernels: m3-plugin bench cpu",
            Exit.ENVIRONMENT,
        )

    from m3_plugin.attention.backends import choose_kernels
    from m3_plugin.cli.bench.clocks import GraphClock, copy_bandwidth, matmul_throughput

    device, dtype, clock = torch.device("cuda"), torch.bfloat16, GraphClock()
    with Console(stderr=True).status("loading peers and measuring what this GPU can do"):
        loaded, status = load_peers(wanted, peer_folder)
        report = Report(
            machine=machine_facts() | gpu_facts(),
            geometry=Geometry(),
            dtype="bfloat16",
            limits=Limits(
                copy_bandwidth(clock, device, num_bytes=2**30),
                matmul_throughput(clock, device, size=8192, dtype=dtype),
            ),
            peers=status,
        )
    with progress_bar() as progress:
        for workload in workloads:
            count = max(3, rounds // 4) if workload.phase == "prefill" else rounds
            task = progress.add_task(workload.label, total=count + 2)
            free, _ = torch.cuda.mem_get_info()
            if (need := memory_needed(workload, report.geometry)) > MEMORY_SHARE * free:
                report.skipped[workload.label] = (
                    f"needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
                )
                continue
            report.rows += measure(
                workload,
                report.geometry,
                kernels=choose_kernels("cuda"),
                peers=loaded,
                device=device,
                dtype=dtype,
                clock=clock,
                limits=report.limits,
                cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
                rounds=count,
                after_round=lambda task=task: progress.advance(task),
            )
            torch.cuda.empty_cache()
    if not as_json:
        print_report(report, Console())
    deliver("bench-kernels", asdict(report), as_json=as_json, output=output)
    if plot is not None:
        plot_report(report, plot)
        Console(stderr=True).print(f"picture: {plot}", markup=False)
    faults = [row.fault for row in report.rows if row.method in (OURS, OURS_INT8) and row.fault]
    raise typer.Exit(Exit.of(not faults))


def load_peers(wanted: Sequence[str], folder: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The peers that could be loaded, and what became of each."""
    from m3_plugin.cli.bench.peers import PeerUnavailable, load_peer

    loaded, status = {}, {}
    for name in wanted:
        try:
            loaded[name] = load_peer(name, folder)
            status[name] = "loaded"
        except PeerUnavailable as reason:
            status[name] = str(reason)
    return loaded, status


def memory_needed(workload: Workload, geometry: Geometry) -> int:
    """Bytes of one copy for all methods: pages, the layout of SGLang, dense keys, index keys."""
    from m3_kernels.index_pages import bytes_per_token

    w, g = workload, geometry
    tokens = w.batch * w.blocks * 128
    keys_and_values = tokens * 2 * g.num_kv_heads * g.head_dim * 2
    return 3 * keys_and_values + tokens * (g.index_dim * 2 + bytes_per_token(g.index_dim))


def measure(
    workload: Workload,
    geometry: Geometry,
    *,
    kernels: KernelChoice,
    peers: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
    limits: Limits,
    cache_bytes: int,
    rounds: int,
    after_round: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Check every method on one workload, then time those that are right, in turn.

    Parameters
    ----------
    peers : layer classes of `load_peer` by name
    cache_bytes : size of the last-level cache that data must not be found in
    """
    import torch

    from m3_kernels.index_pages import bytes_per_token
    from m3_plugin.cli.bench.clocks import time_in_turn
    from m3_plugin.cli.bench.layer import (
        DenseMethod,
        Layer,
        OurInt8Method,
        OurMethod,
        PeerMethod,
    )

    makers: dict[str, Callable[[Layer], Method]] = {
        OURS: lambda layer: OurMethod(layer, kernels),
        OURS_INT8: lambda layer: OurInt8Method(layer, kernels),
        **{name: lambda layer, peer=peer: PeerMethod(layer, peer) for name, peer in peers.items()},
        DENSE: DenseMethod,
    }
    value = dtype.itemsize
    work = {name: sparse_work(workload, geometry, bytes_per_value=value) for name in makers}
    work[OURS_INT8] = sparse_work(
        workload,
        geometry,
        bytes_per_value=value,
        index_token_bytes=bytes_per_token(geometry.index_dim),
    )
    work[DENSE] = dense_work(workload, geometry, bytes_per_value=value)
    floors = {
        name: floor_seconds(
            needed,
            bytes_per_second=limits.bytes_per_second,
            operations_per_second=limits.operations_per_second,
        )
        for name, needed in work.items()
    }
    copies = copies_beyond_cache(work[OURS].bytes_moved, cache_bytes=cache_bytes)
    with torch.inference_mode():
        layers = [
            Layer(workload, geometry, device=device, dtype=dtype, seed=seed)
            for seed in range(copies)
        ]
        prepared: dict[tuple[str, str], Callable[[], float]] = {}
        faults: dict[str, str] = {}
        for name, make in makers.items():
            try:
                methods = [make(layer) for layer in layers]
                methods[0].check()
                for part, calls in _calls(methods).items():
                    count = calls_in_graph(floors[name], copies)
                    repeated = [calls[i % copies] for i in range(count)]
                    prepared[name, part] = clock.prepare(repeated)
            except Exception as error:
                # A peer may fail in any way; what it says is the result.
                kind = "" if isinstance(error, GateError) else f"{type(error).__name__}: "
                faults[name] = f"{kind}{error}"
                for part in [key for key in prepared if key[0] == name]:
                    del prepared[part]
        keys = {f"{name} {part}": (name, part) for name, part in prepared}
        timings = time_in_turn(
            {label: prepared[key] for label, key in keys.items()},
            rounds=rounds,
            after_round=after_round,
        )
    rows = [
        _row(workload, *keys[label], timing, floors[keys[label][0]])
        for label, timing in timings.items()
    ]
    for name, fault in faults.items():
        rows.append(_row(workload, name, "whole", None, floors[name], fault=fault))
    return rows


def calls_in_graph(floor: float, copies: int) -> int:
    """Calls captured together: enough to fill `GRAPH_SECONDS`, every copy equally often."""
    needed = min(MAX_CALLS, max(1, round(GRAPH_SECONDS / floor)))
    return -(-needed // copies) * copies


def _calls(methods: Sequence[Method]) -> dict[str, list[Callable[[], object]]]:
    """Calls by part, one per copy; "whole" runs all parts of a copy."""
    calls: dict[str, list[Callable[[], object]]] = {"whole": []}
    for method in methods:
        parts = list(method.parts().items())

        def whole(parts: Any = parts) -> None:
            for _, part in parts:
                part()

        calls["whole"].append(whole)
        if len(parts) > 1:
            for name, part in parts:
                calls.setdefault(name, []).append(part)
    return calls


def _row(
    workload: Workload,
    method: str,
    part: str,
    timing: Timing | None,
    floor: float,
    *,
    fault: str | None = None,
) -> Row:
    w = workload
    first, third = timing.quartiles if timing else (None, None)
    return Row(
        phase=w.phase,
        batch=w.batch,
        context=w.context,
        rows=w.rows,
        pattern=w.pattern,
        method=method,
        part=part,
        fault=fault,
        median_us=timing.median * 1e6 if timing else None,
        first_quartile_us=first * 1e6 if first is not None else None,
        third_quartile_us=third * 1e6 if third is not None else None,
        minimum_us=timing.minimum * 1e6 if timing else None,
        rounds=len(timing.seconds) if timing else 0,
        floor_us=floor * 1e6 if part == "whole" else None,
    )


def print_report(report: Report, console: Console) -> None:
    """The table, the machine above it, and what was left out below."""
    limits = report.limits
    console.print(
        f"{headline(report.machine)}; copies at {limits.bytes_per_second / 1e9:,.0f} GB/s, "
        f"multiplies at {limits.operations_per_second / 1e12:,.0f} TFLOP/s",
        highlight=False,
    )
    table = table_of(
        f"one sparse layer, {report.dtype}",
        left=("workload", "method"),
        right=("median us", "quartiles", "of floor", "speed-up"),
    )
    for workload in _workloads(report):
        for row in (row for row in report.rows if workload_of(row) == workload):
            table.add_row(*_cells(report, workload, row), style="red" if row.fault else None)
        table.add_section()
    console.print(table)
    console.print(f"speed-up: of {OURS} over the method in the row; none where either is wrong")
    for row in report.rows:
        if row.fault:
            line = f"{workload_of(row).label} {row.method}: not timed: {row.fault}"
            console.print(line, style="red", markup=False, highlight=False)
    for label, reason in report.skipped.items():
        console.print(f"{label}: skipped, {reason}", style="yellow", highlight=False)
    for name, status in report.peers.items():
        if status != "loaded":
            line = f"{name} takes no part: {status}"
            console.print(line, style="yellow", markup=False, highlight=False)


def _cells(report: Report, workload: Workload, row: Row) -> list[str]:
    method = row.method if row.part == "whole" else f"  {row.method} {row.part}"
    if row.fault or row.median_us is None:
        return [workload.label, method, "WRONG", "", "", ""]
    assert row.first_quartile_us is not None
    assert row.third_quartile_us is not None
    faster = report.speedup(workload, row.method) if row.part == "whole" else None
    return [
        workload.label,
        method,
        short(row.median_us),
        f"{short(row.first_quartile_us)} - {short(row.third_quartile_us)}",
        f"{row.floor_us / row.median_us:.0%}" if row.floor_us else "",
        f"{faster:.2f}x" if faster and row.method != OURS else "",
    ]


def plot_report(report: Report, path: Path) -> None:
    """Time against context, one panel per phase, batch and pattern, the floor drawn in."""
    colours = {OURS: "C3", OURS_INT8: "C1", "vllm": "C0", "sglang": "C2", DENSE: "C7"}
    panels = []
    for phase, batch, rows, pattern in dict.fromkeys(
        (w.phase, w.batch, w.rows, w.pattern) for w in _workloads(report)
    ):
        curves = []
        for method, colour in colours.items():
            found = [
                row
                for row in report.rows
                if (row.phase, row.batch, row.rows, row.pattern, row.method, row.part)
                == (phase, batch, rows, pattern, method, "whole")
            ]
            points = tuple(sorted(_points(found)))
            if points:
                curves.append(Curve(method, colour, points))
            if method == OURS:
                floor = tuple(
                    sorted(
                        (r.context, r.floor_us, r.floor_us, r.floor_us) for r in found if r.floor_us
                    )
                )
                curves.append(Curve("roofline", "black", floor, line="--"))
        suffix = "" if phase == "decode" else f", {rows} rows, {pattern} blocks"
        panels.append(Panel(f"{phase}, batch {batch}{suffix}", tuple(curves)))
    plot_panels(
        panels,
        path,
        title=f"{report.machine.get('gpu', report.machine['cpu'])}, {report.dtype}, "
        f"commit {report.machine['commit']}",
        unit="us per layer, median and quartiles",
    )


def _points(rows: Sequence[Row]) -> Iterator[tuple[float, float, float, float]]:
    for row in rows:
        if row.median_us and row.first_quartile_us and row.third_quartile_us:
            yield row.context, row.median_us, row.first_quartile_us, row.third_quartile_us


def _workloads(report: Report) -> list[Workload]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(workload_of(row) for row in report.rows))


def _pairs(text: str, option: str) -> list[tuple[int, int]]:
    """ "1x8192,64x131072" as pairs."""
    pairs = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = numbers(part.replace("x", ","), option)
        if len(found) != 2:
            raise typer.BadParameter(f"not batch x context: {part!r}", param_hint=option)
        pairs.append((found[0], found[1]))
    return pairs
