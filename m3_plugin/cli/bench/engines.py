"""Whole engines in turn on the same checkpoint: ours, and llama.cpp's server in two ways.

One client asks all of them over HTTP with the same token ids: a prompt as long as the context, then
prompts of which the last chunk alone is new, so that every engine reads that chunk at the same
depth and decodes behind it. The engines take turns, request by request, and idle ones sleep.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from m3_plugin.cli.bench.llama_cpp import (
    VARIANTS,
    attention_of,
    find_server,
    started,
    version_of,
)
from m3_plugin.cli.bench.report import Curve, Panel, progress_bar, short, table_of
from m3_plugin.cli.bench.serve import ClientFailed, Decoding, read_decoding
from m3_plugin.cli.bench.step import MODEL, OUTPUT_TOKENS, served, write_step_checkpoint
from m3_plugin.cli.host_metrics import openai_client, settled
from m3_plugin.cli.hosts import HOSTS, Host, require_libraries
from m3_plugin.diagnosis.hosts import HOSTS as ENTRIES
from m3_plugin.diagnosis.hosts import installed_version
from m3_plugin.testing.hub_layout import MARKER_TOKENS, SPECIAL_TOKENS

# Prompts are of the 256 byte tokens, answers of one word: engines hold back a byte that is no text.
_FIRST_BYTE = len(SPECIAL_TOKENS) + len(MARKER_TOKENS)
_FIRST_WORD = _FIRST_BYTE + 256
_PARTS = ("dense", "select", "attend", "store", "rest")
_COLOURS = ("C3", "C0", "C7")


@dataclass(frozen=True)
class Engine:
    """One engine that takes part.

    Attributes
    ----------
    name : in reports
    version : of the engine
    options : with which it was started, beside files, context, threads and address
    attention : "msa" or "dense"; of llama.cpp told from its answers
    """

    name: str
    version: str
    options: str
    attention: str


@dataclass(frozen=True)
class EngineRow:
    """One engine at one context, times as its client saw them.

    Attributes
    ----------
    prompt_ms : from sending a prompt of `context` tokens to the first token of its answer; once
    chunk : new tokens behind `context - chunk` which the engine had read before
    chunk_ms, chunk_low_ms, chunk_high_ms : to the first token behind them: median, lowest, highest
        of `rounds` prompts
    token_ms, token_low_ms, token_high_ms : per further token, the mean of an answer, alike
    dense_ms, select_ms, attend_ms, store_ms : of it our dense layers; in our MSA layers choosing
        blocks, attending, and norm, RoPE and storing; as the server counted. None for peers
    rest_ms : projections, experts, the host and HTTP
    """

    engine: str
    context: int
    prompt_ms: float
    chunk: int
    chunk_ms: float
    chunk_low_ms: float
    chunk_high_ms: float
    token_ms: float
    token_low_ms: float
    token_high_ms: float
    rounds: int
    dense_ms: float | None = None
    select_ms: float | None = None
    attend_ms: float | None = None
    store_ms: float | None = None
    rest_ms: float | None = None


@dataclass
class Engines:
    """What came of it.

    Attributes
    ----------
    model : layers and sizes of the random checkpoint that all of them serve
    left_out : why an engine has no numbers at a context
    """

    model: str = MODEL
    engines: list[Engine] = field(default_factory=list)
    rows: list[EngineRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What every engine is asked.

    Attributes
    ----------
    contexts : tokens of the prompts, ascending, each longer than `chunk`
    chunk : tokens of a prompt that are new in each round
    rounds : prompts at each context behind the first one
    limit_s : longest time to a first token
    threads : of every engine
    """

    contexts: tuple[int, ...]
    chunk: int
    rounds: int
    limit_s: float
    threads: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.contexts) + OUTPUT_TOKENS


@dataclass(frozen=True)
class Contestant:
    """A running engine, as the client needs it.

    Attributes
    ----------
    decoding : its own counters of its layers' times; None for peers
    stop : ends it, for good
    """

    name: str
    url: str
    model: str
    decoding: Callable[[], Decoding] | None = None
    stop: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Reply:
    """To the first token, and per further one."""

    first_ms: float
    token_ms: float


class TookTooLong(Exception):
    """No token within the limit."""


def usable_server(built: Path) -> Path:
    """llama.cpp's server where it was built, if everything that measuring needs is there.

    Raises
    ------
    LookupError : names what is missing.
    """
    from m3_plugin.testing.gguf_file import require_gguf

    server = find_server(built)
    require_gguf()
    require_libraries("openai")
    return server


def measure_engines(plan: Plan, *, llama_server: Path, host: Host, console: Console) -> Engines:
    """Ours and llama.cpp's server, with MSA and as it starts by default.

    Raises
    ------
    GateError : llama.cpp's answers to the constructed checkpoint are wrong, or not those of MSA.
    LookupError, ServerFailed, ClientFailed : an engine cannot be started or asked.
    """
    found = Engines()
    version = version_of(llama_server)
    with tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder, ExitStack() as servers:
        scratch = Path(folder)
        with console.status("asking llama.cpp what only the right blocks answer"):
            found.engines = _judged(llama_server, version, scratch, threads=plan.threads)
        with console.status("writing a random checkpoint"):
            checkpoint, file = _random_files(scratch)
        contestants = []
        for variant in VARIANTS:
            own = servers.enter_context(ExitStack())
            process = own.enter_context(
                started(
                    llama_server,
                    file,
                    variant,
                    context=plan.longest,
                    threads=plan.threads,
                    log=scratch / f"{len(contestants)}.log",
                )
            )
            contestants.append(Contestant(variant.name, process.url, "m3", stop=own.close))
        own = servers.enter_context(ExitStack())
        with console.status(f"starting {host.title}"):
            ours = own.enter_context(
                served(checkpoint, "ours", longest=plan.longest, host=host, threads=plan.threads)
            )
        name = f"m3-plugin on {host.title}"
        found.engines.insert(0, Engine(name, _host_version(host), "", "msa"))
        contestants.insert(
            0,
            Contestant(
                name,
                ours.url,
                ours.model,
                decoding=lambda: read_decoding(ours.url, host=host),
                stop=own.close,
            ),
        )
        found.rows, found.left_out = take_turns(plan, contestants)
    return found


def _judged(server: Path, version: str, scratch: Path, *, threads: int) -> list[Engine]:
    """llama.cpp as it is started for each variant, and what it attends there."""
    from m3_plugin.testing.constructed import ConstructedCheckpoint
    from m3_plugin.testing.gguf_file import write_gguf

    file = write_gguf(ConstructedCheckpoint().write(scratch / "constructed"))
    engines = []
    for variant in VARIANTS:
        log = scratch / "judged.log"
        with started(server, file, variant, context=2048, threads=threads, log=log) as process:
            attention = attention_of(process, variant)
        options = " ".join(variant.options)
        engines.append(Engine(variant.name, version, options, attention))
    return engines


def _random_files(scratch: Path) -> tuple[Path, Path]:
    from m3_plugin.testing.gguf_file import write_gguf

    checkpoint = write_step_checkpoint(scratch / "checkpoint")
    # beside the checkpoint, where a host takes no notice of it
    return checkpoint, write_gguf(checkpoint)


def _host_version(host: Host) -> str:
    name = next(name for name, known in HOSTS.items() if known is host)
    return installed_version(ENTRIES[name]) or "unknown"


def take_turns(
    plan: Plan, contestants: Sequence[Contestant]
) -> tuple[list[EngineRow], dict[str, str]]:
    """Ask every contestant at every context, in turn; rows, and what was left out.

    Who exceeds the limit at one context is stopped, and is not asked at longer ones. A first prompt
    is not counted: engines and the client make things when they are first needed.
    """
    rows: list[EngineRow] = []
    left_out: dict[str, str] = {}
    running = list(contestants)
    last: dict[str, tuple[int, float]] = {}

    def read_within_limit(contestant: Contestant, prompt: list[int]) -> Reply | None:
        known_at, known_s = last.get(contestant.name, (len(prompt), 0.0))
        try:
            # at the speed of a shorter context, which a longer one does not exceed
            if known_s * len(prompt) / known_at > plan.limit_s:
                raise TookTooLong
            return ask(contestant, prompt, limit_s=plan.limit_s)
        except TookTooLong:
            running.remove(contestant)
            contestant.stop()
            left_out[f"{contestant.name} from {len(prompt):,} tokens"] = (
                f"reading one prompt takes more than {plan.limit_s / 60:g} minutes "
                "(--prompt-minutes)"
            )
            return None

    with progress_bar() as progress:
        requests = (1 + len(plan.contexts) * (1 + plan.rounds)) * len(running)
        task = progress.add_task("engines", total=requests)
        for contestant in tuple(running):
            progress.update(task, description=f"{contestant.name}: warming up")
            read_within_limit(contestant, _random_ids("warming up", plan.contexts[0]))
            progress.advance(task)
        for context in plan.contexts:
            prompts = Prompts(context, plan.chunk)
            firsts: dict[str, float] = {}
            for contestant in tuple(running):
                progress.update(task, description=f"{contestant.name}: {context:,} tokens")
                reply = read_within_limit(contestant, prompts.whole)
                if reply is not None:
                    firsts[contestant.name] = reply.first_ms
                    last[contestant.name] = context, reply.first_ms / 1e3
                progress.advance(task)
            rows += _rounds(
                plan, context, running, prompts, firsts, after=lambda: progress.advance(task)
            )
    return rows, left_out


def _rounds(
    plan: Plan,
    context: int,
    running: Sequence[Contestant],
    prompts: Prompts,
    firsts: Mapping[str, float],
    *,
    after: Callable[[], object],
) -> list[EngineRow]:
    """Rows of one context from prompts whose last chunk alone is new."""
    before = {c.name: c.decoding() for c in running if c.decoding is not None}
    replies: dict[str, list[Reply]] = {contestant.name: [] for contestant in running}
    for round_ in range(plan.rounds):
        for contestant in running:
            prompt = prompts.with_new_chunk(round_)
            replies[contestant.name].append(ask(contestant, prompt, limit_s=plan.limit_s))
            after()
    rows = []
    for contestant in running:
        chunks = [reply.first_ms for reply in replies[contestant.name]]
        tokens = [reply.token_ms for reply in replies[contestant.name]]
        parts: dict[str, float | None] = {}
        if contestant.decoding is not None:
            finished = before[contestant.name].requests + plan.rounds
            counted = settled(
                contestant.decoding, lambda now, finished=finished: now.requests >= finished
            )
            parts = parts_of_a_step(counted.since(before[contestant.name]), median(tokens))
        rows.append(
            EngineRow(
                engine=contestant.name,
                context=context,
                prompt_ms=firsts[contestant.name],
                chunk=plan.chunk,
                chunk_ms=median(chunks),
                chunk_low_ms=min(chunks),
                chunk_high_ms=max(chunks),
                token_ms=median(tokens),
                token_low_ms=min(tokens),
                token_high_ms=max(tokens),
                rounds=plan.rounds,
                **parts,
            )
        )
    return rows


def parts_of_a_step(counted: Decoding, token_ms: float) -> dict[str, float | None]:
    """Milliseconds of each part of a decode step; empty where the server does not count.

    Parameters
    ----------
    counted : what its counters grew by
    token_ms : a step as its client saw it
    """
    if not counted.steps:
        return {}
    known: dict[str, float | None] = {
        f"{part}_ms": 1e3 * getattr(counted, part) / counted.steps
        for part in _PARTS
        if part != "rest"
    }
    return known | {"rest_ms": token_ms - sum(part for part in known.values() if part is not None)}


class Prompts:
    """Token ids of one context: the same for all engines, others at every context.

    Attributes
    ----------
    whole : the first prompt, `context` tokens
    """

    def __init__(self, context: int, chunk: int) -> None:
        self.context, self.chunk = context, chunk
        self.whole = _random_ids(f"whole {context}", context)

    def with_new_chunk(self, round_: int) -> list[int]:
        """The first prompt with another last chunk."""
        new = _random_ids(f"chunk {self.context} {round_}", self.chunk)
        return [*self.whole[: self.context - self.chunk], *new]


def _random_ids(seed: str, count: int) -> list[int]:
    return random.Random(seed).choices(range(_FIRST_BYTE, _FIRST_WORD), k=count)


def ask(contestant: Contestant, prompt: Sequence[int], *, limit_s: float) -> Reply:
    """One answer of `OUTPUT_TOKENS` tokens, as it arrives.

    Raises
    ------
    TookTooLong : nothing arrived within the limit.
    ClientFailed : the engine refused, or ended its answer early.
    """
    import httpx
    from openai import APIError, APITimeoutError

    client = openai_client(contestant.url, timeout_s=limit_s)
    start = time.perf_counter()
    arrived = []
    try:
        stream = client.completions.create(
            model=contestant.model,
            prompt=list(prompt),
            max_tokens=OUTPUT_TOKENS,
            temperature=0,
            stream=True,
            logit_bias={str(_FIRST_WORD): 100},
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                arrived.append(time.perf_counter())
    except (APITimeoutError, httpx.TimeoutException):
        raise TookTooLong from None
    except (APIError, httpx.HTTPError) as error:
        raise ClientFailed(f"{contestant.name} gave no answer: {error}") from None
    if len(arrived) < 2:
        raise ClientFailed(f"{contestant.name} sent {len(arrived)} of {OUTPUT_TOKENS} tokens")
    # a slow client may get two tokens at once, so that pieces are not counted
    per_token = (arrived[-1] - arrived[0]) / (OUTPUT_TOKENS - 1)
    return Reply(first_ms=1e3 * (arrived[0] - start), token_ms=1e3 * per_token)


def print_engines(found: Engines, console: Console) -> None:
    """Two tables: all engines, and the parts of our step."""
    for engine in found.engines:
        said = f"{engine.name}: {engine.version}, attends {engine.attention}"
        console.print(said, highlight=False, markup=False)
    chunk = found.rows[0].chunk if found.rows else 0
    table = table_of(
        f"whole engines: {found.model}",
        left=("context", "engine"),
        right=("prompt", f"{chunk} more, tok/s", "ms per token"),
    )
    for row in found.rows:
        speeds = [
            row.chunk / ms * 1e3 for ms in (row.chunk_ms, row.chunk_high_ms, row.chunk_low_ms)
        ]
        table.add_row(
            f"{row.context:,}",
            row.engine,
            f"{short(row.prompt_ms / 1e3)} s",
            _spread(*speeds),
            _spread(row.token_ms, row.token_low_ms, row.token_high_ms),
            style="bold" if row.rest_ms is not None else None,
            end_section=row is found.rows[-1]
            or found.rows[found.rows.index(row) + 1].context != row.context,
        )
    console.print(table)
    console.print("median (lowest - highest); the prompt once", highlight=False)
    if any(row.rest_ms is not None for row in found.rows):
        console.print(_table_of_parts(found.rows))
    for name, reason in found.left_out.items():
        console.print(f"{name} left out: {reason}", markup=False, highlight=False)


def _spread(middle: float, low: float, high: float) -> str:
    return f"{short(middle)} ({short(low)} - {short(high)})"


def _table_of_parts(rows: Sequence[EngineRow]) -> Table:
    table = table_of(
        "parts of a decode step of ours, ms and share",
        left=("context",),
        right=("step", *_PARTS),
    )
    for row in rows:
        if row.rest_ms is None:
            continue
        parts = [getattr(row, f"{part}_ms") for part in _PARTS]
        cells = [f"{short(part)} {part / row.token_ms:.0%}" for part in parts]
        table.add_row(f"{row.context:,}", short(row.token_ms), *cells)
    return table


def panels_of(found: Engines) -> list[Panel]:
    """Decoding, reading a chunk, and shares of our step."""

    def curves(kind: str) -> tuple[Curve, ...]:
        return tuple(
            Curve(engine.name, colour, _points(found.rows, engine.name, kind))
            for engine, colour in zip(found.engines, _COLOURS, strict=False)
            if _points(found.rows, engine.name, kind)
        )

    shares = tuple(
        Curve(part, f"C{at}", points)
        for at, part in enumerate(_PARTS)
        if (points := _share_points(found.rows, part))
    )
    chunk = found.rows[0].chunk if found.rows else 0
    panels = [
        Panel("engines: ms per token", curves("token")),
        Panel(f"engines: ms for {chunk} tokens at the end", curves("chunk")),
        Panel("ours: parts of a decode step", shares, share=True),
    ]
    return [panel for panel in panels if panel.curves]


def _points(rows: Sequence[EngineRow], name: str, kind: str) -> tuple[Any, ...]:
    return tuple(
        (row.context, *(getattr(row, f"{kind}{end}_ms") for end in ("", "_low", "_high")))
        for row in rows
        if row.engine == name
    )


def _share_points(rows: Sequence[EngineRow], part: str) -> tuple[Any, ...]:
    values = [(row.context, getattr(row, f"{part}_ms"), row.token_ms) for row in rows]
    return tuple(
        (context, share := ms / step, share, share)
        for context, ms, step in values
        if ms is not None
    )
