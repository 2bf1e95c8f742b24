"""`m3-plugin bench cpu`: the CPU kernels' speed, next to dense attention in torch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from m3_plugin.cli.bench.engines import (
    Engines,
    Plan,
    measure_engines,
    panels_of,
    print_engines,
    usable_server,
)
from m3_plugin.cli.bench.report import (
    Curve,
    GateError,
    Panel,
    headline,
    load_average,
    machine_facts,
    numbers,
    plot_panels,
    progress_bar,
    short,
    table_of,
)
from m3_plugin.cli.bench.serve import ClientFailed
from m3_plugin.cli.bench.step import MODEL, StepRow, measure_steps
from m3_plugin.cli.exits import Exit, environment, fail
from m3_plugin.cli.hosts import host_to_start
from m3_plugin.cli.options import FrameworkOption, JsonOption, OutputOption, PlotOption
from m3_plugin.cli.outputs import deliver
from m3_plugin.host.serving import ServerFailed

if TYPE_CHECKING:
    from torch import Tensor

    from m3_kernels.index_pages import IndexViews
    from m3_kernels.testing.timing import Timing

# of whole engines, where none are given
ENGINE_CONTEXTS = "1024,8192,32768"
PEERS = ("llama.cpp",)
# MiniMax-M3's own geometry: one sparse layer on one device.
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, INDEX_DIM = 64, 4, 128, 128
PAGE_SIZE, TOPK = 128, 16
GROUP = NUM_Q_HEADS // NUM_KV_HEADS
SCALE = HEAD_DIM**-0.5
BYTES_PER_VALUE = 2
DENSE = ("dense sdpa", "dense bmm")
PLANES = "native planes"
# of an index key in two planes, which a scan reads: its high byte of each channel and its scale
SCANNED_BYTES = INDEX_DIM + 2
BMM_KEYS = 8192


@dataclass(frozen=True)
class Row:
    """One measured function at one context.

    Attributes
    ----------
    phase : "decode" (one query row) or "prefill" (the last `rows` of the context)
    bytes_read : cache bytes the method cannot avoid reading; None where compute decides
    """

    phase: str
    name: str
    context: int
    rows: int
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    minimum_ms: float
    rounds: int
    bytes_read: int | None = None
    gb_per_second: float | None = None


@dataclass
class Report:
    """Everything a reader needs to judge the numbers."""

    machine: dict[str, Any]
    geometry: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    beside: Engines | None = None

    def median(self, phase: str, name: str, context: int) -> float | None:
        """Median milliseconds of one measurement, None if it was not made."""
        for row in self.rows:
            if (row.phase, row.name, row.context) == (phase, name, context):
                return row.median_ms
        return None

    def speedup(self, phase: str, name: str, context: int) -> float | None:
        """How many times faster than the better dense peer of the same run."""
        ours = self.median(phase, name, context)
        peers = [self.median(phase, peer, context) for peer in DENSE]
        known = [peer for peer in peers if peer is not None]
        return min(known) / ours if ours and known else None


def bench_cpu(
    contexts: Annotated[
        str, typer.Option(help="Decoding: tokens in the cache, with commas; empty for none.")
    ] = "8192,32768,131072",
    prefill_contexts: Annotated[
        str,
        typer.Option(help="Reading a prompt: tokens when a chunk was read; empty for none."),
    ] = "8192,32768",
    prefill_rows: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt's last chunk, which is timed.")
    ] = 512,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed runs of each method when decoding.")
    ] = 15,
    threads: Annotated[int, typer.Option(help="Threads; 0 for torch's own choice.")] = 0,
    dense: Annotated[bool, typer.Option(help="Time dense attention too.")] = True,
    step_contexts: Annotated[
        str,
        typer.Option(
            help="Whole decode steps of a real server at these contexts, with our dense layers and "
            "with the host's; starts two servers. With --peers: of all engines."
        ),
    ] = "",
    peers: Annotated[
        str, typer.Option(help="Whole engines beside ours, with commas: llama.cpp.")
    ] = "",
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp", help="Where you built llama.cpp: the folder, or its llama-server."
        ),
    ] = None,
    prompt_minutes: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="With --peers: an engine that reads a prompt for longer gets no longer one.",
        ),
    ] = 20,
    framework: FrameworkOption = None,
    as_json: JsonOption = False,
    output: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """How fast are the CPU kernels? One layer in bf16, sparse and dense, beside torch.

    Results are compared first; nothing is timed that is wrong.
    """
    import torch

    if threads > 0:
        torch.set_num_threads(threads)
    decode_at = numbers(contexts, "--contexts")
    prefill_at = numbers(prefill_contexts, "--prefill-contexts")
    built = _built_peer(peers, llama_cpp)
    steps_at = numbers(step_contexts or (ENGINE_CONTEXTS if built else ""), "--step-contexts")
    if built and min(steps_at) <= prefill_rows:
        raise typer.BadParameter(
            f"with --peers each must exceed the {prefill_rows} tokens of --prefill-rows, which are "
            f"read behind the rest; got {min(steps_at)}",
            param_hint="--step-contexts",
        )
    if any(context < prefill_rows for context in prefill_at):
        raise typer.BadParameter("a context is shorter than the chunk", param_hint="--prefill-rows")
    with environment(LookupError):
        llama_server = None if built is None else usable_server(built)
    report = Report(machine=_facts(), geometry=_geometry())
    prefill_rounds = max(3, rounds // 5)
    try:
        if steps_at:
            console = Console(stderr=True)
            with environment(LookupError, ServerFailed, ClientFailed):
                host = host_to_start(framework)
                if llama_server is None:
                    report.steps = measure_steps(steps_at, host=host, console=console)
                else:
                    plan = Plan(
                        contexts=tuple(sorted(set(steps_at))),
                        chunk=prefill_rows,
                        rounds=prefill_rounds,
                        limit_s=60 * prompt_minutes,
                        threads=torch.get_num_threads(),
                    )
                    report.beside = measure_engines(
                        plan, llama_server=llama_server, host=host, console=console
                    )
        with progress_bar() as progress:
            work = [("decode", context, 1, rounds) for context in decode_at]
            work += [("prefill", context, prefill_rows, prefill_rounds) for context in prefill_at]
            for phase, context, rows, count in work:
                task = progress.add_task(f"{phase} {context:,}", total=count + 1)
                report.rows += measure(
                    phase,
                    context,
                    rows=rows,
                    rounds=count,
                    dense=dense,
                    after_round=lambda task=task: progress.advance(task),
                )
    except GateError as error:
        fail(f"no numbers: {error}", Exit.WRONG_RESULT)
    report.machine["load_average_after"] = load_average()
    if not as_json:
        _print(report, Console())
    deliver("bench-cpu", asdict(report), as_json=as_json, output=output)
    if plot is not None:
        _plot(report, plot)
        Console(stderr=True).print(f"picture: {plot}", markup=False)


def _built_peer(peers: str, llama_cpp: Path | None) -> Path | None:
    """Where the peer that was asked for was built; None without peers.

    Raises
    ------
    typer.BadParameter : an unknown peer, or one of the two options without the other.
    """
    names = [name.strip() for name in peers.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(PEERS)):
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; known: {', '.join(PEERS)}", param_hint="--peers"
        )
    if names and llama_cpp is None:
        raise typer.BadParameter(
            "--peers llama.cpp needs the folder in which you built llama.cpp, or its llama-server",
            param_hint="--llama-cpp",
        )
    if llama_cpp is not None and not names:
        raise typer.BadParameter("is used with --peers llama.cpp only", param_hint="--llama-cpp")
    return llama_cpp


def measure(
    phase: str,
    context: int,
    *,
    rows: int,
    rounds: int,
    dense: bool = True,
    after_round: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Time every method on the same keys and values, in turn.

    Parameters
    ----------
    context : keys in the cache, the rows' own included
    rows : query rows, which stand at the end of the context

    Raises
    ------
    GateError : the C++ and the torch implementation disagree beyond rounding
    """
    import torch

    from m3_kernels import kernel_families
    from m3_kernels.testing.timing import time_interleaved

    layer = _Layer(context, rows)
    ours = [family.name for family in kernel_families("cpu") if family.refusal is None]
    ours.remove("reference")
    if {"native", "torch"} <= set(ours):
        _check(layer)
    # Plain torch gathers whole pages per row; in prefill that is minutes, and known to be slow.
    if phase == "prefill" and "native" in ours:
        ours.remove("torch")
    functions: dict[str, Callable[[], object]] = {}
    for name in ours:
        functions[f"{name} index_topk"] = lambda name=name: layer.index_topk(name)
        functions[f"{name} sparse_attention"] = lambda name=name: layer.sparse_attention(name)
        functions[name] = lambda name=name: layer.both(name)
        functions[f"{name} dense_attention"] = lambda name=name: layer.whole(name)
    if "native" in ours:
        layer.planes()
        functions[f"{PLANES} index_topk"] = lambda: layer.index_topk_planes("native")
        functions[PLANES] = lambda: layer.sparse_attention(
            "native", layer.index_topk_planes("native")
        )
    if dense:
        functions["dense sdpa"] = layer.dense_sdpa if rows == 1 else layer.dense_sdpa_chunk
        if rows == 1:
            functions["dense bmm"] = layer.dense_bmm
    with torch.inference_mode():
        timings = time_interleaved(functions, rounds=rounds, after_round=after_round)
    return [_row(phase, name, context, rows, timing) for name, timing in timings.items()]


class _Layer:
    """One sparse layer's inputs: paged for our kernels, contiguous for the dense peers."""

    def __init__(self, context: int, rows: int) -> None:
        import torch

        random = torch.Generator().manual_seed(context)

        def normal(*shape: int) -> Tensor:
            # Generated in pieces: one fp32 tensor of a long context would not fit beside the rest.
            out = torch.empty(shape, dtype=torch.bfloat16)
            for piece in out.view(-1, shape[-1]).split(2**16):
                piece.copy_(torch.randn(piece.shape, generator=random))
            return out

        pages = -(-context // PAGE_SIZE)
        self.rows = rows
        self.context = context
        self.pages = pages
        self.q = normal(rows, NUM_Q_HEADS, HEAD_DIM)
        self.index_q = normal(rows, NUM_KV_HEADS, INDEX_DIM)
        self.k_pages = normal(pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
        self.v_pages = normal(pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
        self.index_k_pages = normal(pages, PAGE_SIZE, INDEX_DIM)
        self.page_table = torch.randperm(pages, generator=random).int()[None]
        self.cu_seqlens_q = torch.tensor([0, rows], dtype=torch.int32)
        self.seq_lens = torch.tensor([context], dtype=torch.int32)
        self.block_ids = self.index_topk("auto")
        self._dense: tuple[Tensor, Tensor] | None = None
        self._planes: IndexViews | None = None

    def last_rows(self, count: int) -> _Layer:
        """The same layer with at most the last `count` query rows."""
        import torch

        last = copy.copy(self)
        last.rows = min(count, self.rows)
        last.q, last.index_q = self.q[-last.rows :], self.index_q[-last.rows :]
        last.cu_seqlens_q = torch.tensor([0, last.rows], dtype=torch.int32)
        last.block_ids = self.block_ids[:, -last.rows :]
        return last

    def index_topk(self, backend: Any) -> Tensor:
        from m3_kernels.index_topk import index_topk

        return index_topk(
            self.index_q,
            self.index_k_pages,
            page_table=self.page_table,
            cu_seqlens_q=self.cu_seqlens_q,
            seq_lens=self.seq_lens,
            topk=TOPK,
            backend=backend,
        )

    def planes(self) -> IndexViews:
        """The index keys in two planes, as hosts allocate them."""
        import torch

        from m3_kernels.cache_store.torch_cpu import in_planes
        from m3_kernels.index_pages import PLANES_DTYPE, channels, split_planes

        if self._planes is None:
            width = channels(INDEX_DIM, PLANES_DTYPE)
            views = split_planes(torch.zeros(self.pages, PAGE_SIZE, width, dtype=PLANES_DTYPE))
            assert views.scales is not None
            assert views.low is not None
            # In pieces: the fp32 copies of a long context would not fit beside the rest.
            for part in torch.arange(self.pages).split(2**9):
                keys = self.index_k_pages[part].flatten(0, 1)
                high, low, scales = in_planes(keys, views.scales.dtype)
                shape = (len(part), PAGE_SIZE)
                views.keys[part], views.low[part] = (
                    high.unflatten(0, shape),
                    low.unflatten(0, shape),
                )
                views.scales[part] = scales.unflatten(0, shape)
            self._planes = views
        return self._planes

    def index_topk_planes(self, backend: Any) -> Tensor:
        from m3_kernels.index_topk import index_topk

        views = self.planes()
        return index_topk(
            self.index_q,
            views.keys,
            page_table=self.page_table,
            cu_seqlens_q=self.cu_seqlens_q,
            seq_lens=self.seq_lens,
            topk=TOPK,
            index_k_scales=views.scales,
            index_k_low=views.low,
            backend=backend,
        )

    def sparse_attention(self, backend: Any, block_ids: Tensor | None = None) -> Tensor:
        from m3_kernels.sparse_attention import sparse_attention

        return sparse_attention(
            self.q,
            self.k_pages,
            self.v_pages,
            self.block_ids if block_ids is None else block_ids,
            page_table=self.page_table,
            cu_seqlens_q=self.cu_seqlens_q,
            seq_lens=self.seq_lens,
            scale=SCALE,
            backend=backend,
        )

    def both(self, backend: Any) -> Tensor:
        return self.sparse_attention(backend, self.index_topk(backend))

    def whole(self, backend: Any) -> Tensor:
        """What a dense layer computes of the same keys."""
        from m3_kernels.dense_attention import dense_attention

        return dense_attention(
            self.q,
            self.k_pages,
            self.v_pages,
            page_table=self.page_table,
            cu_seqlens_q=self.cu_seqlens_q,
            seq_lens=self.seq_lens,
            scale=SCALE,
            backend=backend,
        )

    def dense_keys(self) -> tuple[Tensor, Tensor]:
        """K and V [num_kv_heads, context, head_dim] without paging: the peers' best case."""
        if self._dense is None:
            order = self.page_table[0].long()
            k, v = (
                pages[order].transpose(0, 1).flatten(1, 2)[:, : self.context].contiguous()
                for pages in (self.k_pages, self.v_pages)
            )
            self._dense = k, v
        return self._dense

    def dense_sdpa(self) -> Tensor:
        """SDPA with the heads of a group folded into rows, its fastest form on CPU."""
        from torch.nn.functional import scaled_dot_product_attention

        k, v = self.dense_keys()
        q = self.q.view(1, NUM_KV_HEADS, GROUP, HEAD_DIM)
        return scaled_dot_product_attention(q, k[None], v[None], scale=SCALE)

    def dense_sdpa_chunk(self) -> Tensor:
        """SDPA of a chunk of rows at the end of the context, causal."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        k, v = self.dense_keys()
        q = self.q.view(self.rows, NUM_KV_HEADS, GROUP, HEAD_DIM).permute(1, 2, 0, 3)
        first = self.context - self.rows
        mask = torch.arange(self.context) <= torch.arange(first, self.context)[:, None]
        # KV heads take the place of the batch, so that the group shares keys without copies.
        shape = (NUM_KV_HEADS, GROUP, self.context, HEAD_DIM)
        return scaled_dot_product_attention(
            q, k[:, None].expand(shape), v[:, None].expand(shape), attn_mask=mask, scale=SCALE
        )

    def dense_bmm(self) -> Tensor:
        """Online softmax over blocks of keys with batched products."""
        import torch

        k, v = self.dense_keys()
        q = self.q.view(NUM_KV_HEADS, GROUP, HEAD_DIM)
        best = torch.full((NUM_KV_HEADS, GROUP, 1), -torch.inf)
        total = torch.zeros_like(best)
        out = torch.zeros(NUM_KV_HEADS, GROUP, HEAD_DIM)
        for keys, values in zip(k.split(BMM_KEYS, 1), v.split(BMM_KEYS, 1), strict=True):
            logits = torch.bmm(q, keys.transpose(1, 2)).float() * SCALE
            new_best = torch.maximum(best, logits.amax(-1, keepdim=True))
            weights = (logits - new_best).exp_()
            rescale = (best - new_best).exp_()
            total = total * rescale + weights.sum(-1, keepdim=True)
            out = out * rescale + torch.bmm(weights.bfloat16(), values)
            best = new_best
        return (out / total).bfloat16()


def _check(layer: _Layer) -> None:
    """Raise GateError unless the methods agree, so that no speed of a wrong result is printed.

    C++ against plain torch on the last rows: one id in 16 may differ, by scores closer than
    rounding; none from keys in two planes, whose scores are sums of integers. In decode also the
    dense op in C++ against the dense peers.
    """

    last = layer.last_rows(4)
    native_ids, plain_ids = last.index_topk("native"), last.index_topk("torch")
    different = float((native_ids != plain_ids).float().mean())
    if different > 1 / TOPK:
        raise GateError(f"{different:.1%} of the blocks chosen by C++ and by torch differ")
    if not last.index_topk_planes("native").equal(last.index_topk_planes("torch")):
        raise GateError("blocks chosen by C++ and by torch from keys in two planes differ")
    results = {
        "torch": (last.sparse_attention("native"), last.sparse_attention("torch")),
        "torch over all blocks": (last.whole("native"), last.whole("torch")),
    }
    if layer.rows == 1:
        dense = layer.whole("native")
        results["dense sdpa"] = dense, layer.dense_sdpa().view_as(dense)
        results["dense bmm"] = dense, layer.dense_bmm().view_as(dense)
    for name, (ours, theirs) in results.items():
        error = float((ours.float() - theirs.float()).abs().max())
        allowed = 0.02 * float(theirs.float().abs().max())
        if not error <= allowed:
            raise GateError(f"C++ and {name} differ by {error:.3g}, allowed {allowed:.3g}")


def _bytes_read(name: str, context: int) -> int | None:
    keys_and_values = 2 * NUM_KV_HEADS * HEAD_DIM * BYTES_PER_VALUE
    index = context * (SCANNED_BYTES if name.startswith(PLANES) else INDEX_DIM * BYTES_PER_VALUE)
    chosen = min(context, TOPK * PAGE_SIZE) * keys_and_values
    if name in DENSE or name.endswith("dense_attention"):
        return context * keys_and_values
    if name.endswith("index_topk"):
        return index
    if name.endswith("sparse_attention"):
        return chosen
    return index + chosen


def _row(phase: str, name: str, context: int, rows: int, timing: Timing) -> Row:
    first, third = timing.quartiles
    read = _bytes_read(name, context) if phase == "decode" else None
    return Row(
        phase=phase,
        name=name,
        context=context,
        rows=rows,
        median_ms=timing.median * 1e3,
        first_quartile_ms=first * 1e3,
        third_quartile_ms=third * 1e3,
        minimum_ms=timing.minimum * 1e3,
        rounds=len(timing.seconds),
        bytes_read=read,
        gb_per_second=read / timing.median / 1e9 if read else None,
    )


def _geometry() -> dict[str, Any]:
    return {
        "num_q_heads": NUM_Q_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "index_dim": INDEX_DIM,
        "page_size": PAGE_SIZE,
        "topk": TOPK,
        "dtype": "bfloat16",
    }


def _facts() -> dict[str, Any]:
    import torch

    from m3_kernels import kernel_families

    return {
        **machine_facts(),
        "threads": torch.get_num_threads(),
        "kernels": {f.name: f.refusal or "available" for f in kernel_families("cpu")},
        "load_average_before": load_average(),
        "read_gb_per_second": _read_bandwidth(),
    }


def _read_bandwidth() -> float:
    """How fast plain torch reads memory here: the yardstick for achieved bandwidth."""
    import torch

    data = torch.ones(2**26)
    durations = []
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        durations.append(time.perf_counter() - start)
    return round(data.nbytes / sorted(durations)[3] / 1e9, 1)


def _print(report: Report, console: Console) -> None:
    machine = report.machine
    console.print(
        f"{headline(machine)}; {machine['threads']} threads, reads "
        f"{machine['read_gb_per_second']} GB/s; "
        f"load {machine['load_average_before']} to {machine['load_average_after']}",
        highlight=False,
    )
    for phase in ("decode", "prefill"):
        rows = [row for row in report.rows if row.phase == phase]
        if not rows:
            continue
        chunk = f", last {rows[0].rows} rows" if phase == "prefill" else ", one row"
        table = table_of(
            f"{phase} of one sparse layer{chunk}, bf16",
            left=("context", "method"),
            right=("median ms", "quartiles", "GB/s", "speed-up"),
        )
        for row in rows:
            whole = row.name in ("native", "torch", PLANES)
            speedup = report.speedup(phase, row.name, row.context) if whole else None
            table.add_row(
                f"{row.context:,}",
                row.name,
                short(row.median_ms),
                f"{short(row.first_quartile_ms)} - {short(row.third_quartile_ms)}",
                f"{row.gb_per_second:.1f}" if row.gb_per_second else "",
                f"{speedup:.1f}x" if speedup else "",
                style="bold" if row.name == "native" else None,
                end_section=row is rows[-1] or rows[rows.index(row) + 1].context != row.context,
            )
        console.print(table)
    if report.rows:
        console.print("speed-up: over the faster dense method of the same run", highlight=False)
    if report.steps:
        _print_steps(report.steps, console)
    if report.beside is not None:
        print_engines(report.beside, console)


def _print_steps(steps: list[StepRow], console: Console) -> None:
    table = table_of(
        f"decode step of a server: {MODEL}",
        left=("context", "dense layer"),
        right=("first token", "step ms", "dense", "MSA", "rest", "share of dense"),
    )
    for row in steps:
        table.add_row(
            f"{row.context:,}",
            row.dense,
            f"{row.first_token_ms / 1e3:.1f} s",
            *(short(ms) for ms in (row.step_ms, row.dense_ms, row.msa_ms, row.rest_ms)),
            f"{row.dense_ms / row.step_ms:.0%}",
            end_section=row.dense == "host",
        )
    console.print(table)


def _reading(report: Report) -> Curve:
    """How long it takes to read what a scan of two planes reads, at the bandwidth of this run."""
    bandwidth = report.machine["read_gb_per_second"]
    contexts = sorted({row.context for row in report.rows if row.phase == "decode"})
    times = [context * SCANNED_BYTES / bandwidth / 1e6 for context in contexts]
    points = tuple((at, time, time, time) for at, time in zip(contexts, times, strict=True))
    return Curve(f"reading one plane at {bandwidth} GB/s", "C7", points)


def _plot(report: Report, path: Path) -> None:
    names = {
        "native": "sparse, C++",
        PLANES: "sparse, C++, two planes",
        "torch": "sparse, plain torch",
        "native dense_attention": "dense, C++",
    }
    colours = {
        "native": "C3",
        PLANES: "C5",
        "torch": "C1",
        "native dense_attention": "C4",
        "dense sdpa": "C0",
        "dense bmm": "C2",
    }
    panels = []
    for phase in ("decode", "prefill"):
        curves = []
        for name, colour in colours.items():
            rows = [row for row in report.rows if (row.phase, row.name) == (phase, name)]
            points = tuple(
                (r.context, r.median_ms, r.first_quartile_ms, r.third_quartile_ms) for r in rows
            )
            curves.append(Curve(names.get(name, name), colour, points))
        if phase == "decode" and any(curve.points for curve in curves):
            curves.append(_reading(report))
        title = "layer: decode, one row" if phase == "decode" else "layer: prefill chunk"
        panels.append(Panel(title, tuple(curve for curve in curves if curve.points)))
    if report.beside is not None:
        panels += panels_of(report.beside)
    machine = report.machine
    plot_panels(
        [panel for panel in panels if panel.curves],
        path,
        title=f"{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}; "
        "bands: quartiles of a layer, lowest and highest of engines",
        unit="ms",
    )
