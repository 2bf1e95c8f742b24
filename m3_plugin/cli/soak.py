"""`m3-plugin soak`: a server under fire, and every answer judged."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from m3_plugin.cli.exits import Exit, call, environment, fail
from m3_plugin.cli.host_metrics import exposition, openai_client, total
from m3_plugin.cli.hosts import MAX_MODEL_LEN, Host, host_to_start, require_libraries
from m3_plugin.cli.options import (
    ApiKeyOption,
    Framework,
    FrameworkOption,
    JsonOption,
    KeptOutputOption,
    LogOption,
    ModelOption,
    PlotOption,
    UrlOption,
)
from m3_plugin.cli.outputs import deliver, envelope
from m3_plugin.host.serving import ServerFailed, ServerProcess, free_port

if TYPE_CHECKING:
    from m3_plugin.soak.driver import Driver, Outcome
    from m3_plugin.soak.mixture import Mixture
    from m3_plugin.soak.needles import Needles
    from m3_plugin.soak.processes import Process
    from m3_plugin.soak.record import Counters, Minute, Run

COMMAND = "soak"
_MINUTE_S = 60.0
# A server may take so long to give back what it held.
_SETTLING_S = 15.0
# Room for chat template and answer beside the longest prompt.
_MARGIN = 1024
# The cache holds so many requests of the longest kind: some wait, some are preempted.
_CACHE_SHARE = 1.25
# glibc keeps what was freed and gives it out again, at most a block of 32 MB at a time: its memory
# then grows for an hour while nothing more is held. So blocks from 1 MB on go back to the system,
# and threads share two heaps: what is measured is what the server holds.
_GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "MALLOC_ARENA_MAX": "2",
}


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes
    ----------
    processes : what it uses now; () where that cannot be seen
    gone : why it does not run any more, None while it does
    reset_path : what empties its prefix cache, "" where that is not ours to do
    """

    url: str
    processes: Callable[[], Sequence[Process]]
    gone: Callable[[], str | None]
    reset_path: str = ""


def soak(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    framework: FrameworkOption = None,
    model: ModelOption = None,
    constructed: Annotated[
        bool,
        typer.Option(
            "--constructed",
            help="With --url: it serves the checkpoint that `m3-plugin tiny` writes.",
        ),
    ] = False,
    minutes: Annotated[
        int, typer.Option(min=1, help="How long, in minutes under load, earlier runs included.")
    ] = 3,
    idle_every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Minutes from one quiet moment to the next. In one, all requests have ended and "
            "the server must hold nothing.",
        ),
    ] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is asked.")] = 0,
    longest: Annotated[
        int, typer.Option(min=2048, help="Tokens of the longest prompt; the shortest has 100.")
    ] = 16384,
    speculative: Annotated[
        bool,
        typer.Option("--speculative", help="Serve the second half of the time with drafts (MTP)."),
    ] = False,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds after which a request counts as lost.")
    ] = 600,
    max_slope: Annotated[
        float,
        typer.Option(help="MB of resident memory a minute, after the first ten minutes."),
    ] = 1.0,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Ask only what went wrong in this file of --output: alone, then beside what was "
            "under way.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    as_json: JsonOption = False,
    output: KeptOutputOption = None,
    plot: PlotOption = None,
    log: LogOption = None,
) -> None:
    """Accept a machine before traffic: every kind of request, at once, and every answer judged.

    Right, refused with a reason where that is right, or wrong. Wrong and lost end with 1.
    """
    console = Console(stderr=True)
    _require_sense(url, longest=longest, speculative=speculative, constructed=constructed)
    with environment(LookupError, ServerFailed, ValueError):
        require_libraries("openai", "httpx")
        from m3_plugin.soak.mixture import Mixture

        ours = url is None
        settings = {
            "seed": seed,
            "longest": longest,
            "concurrency": concurrency,
            "idle_every": idle_every,
            "needles": "constructed" if ours or constructed else "text",
            "speculative": speculative,
            "max_slope": max_slope,
        }
        if replay is not None:
            with call("--replay", ValueError):
                settings = _stored(replay)["settings"]
        mixture = Mixture(
            settings["seed"], settings["longest"], frozenset() if ours else frozenset({"reset"})
        )
        book = _Book(output if replay is None else None, settings)
        keeper = _Keeper(
            url,
            framework=framework,
            settings=settings,
            model=model,
            api_key=api_key,
            mixture=mixture,
            timeout_s=timeout,
            log=log,
            console=console,
        )
        if replay is not None:
            _replay(keeper, _stored(replay), book.run)
        else:
            _fill(keeper, book, minutes)
    body = book.as_dict()
    if not as_json:
        _print(book)
    deliver(COMMAND, body, as_json=as_json, output=output if replay is not None else None)
    if plot is not None:
        _plot(book.run, plot)
    raise typer.Exit(Exit.of(body["right"]))


def _require_sense(url: str | None, *, longest: int, speculative: bool, constructed: bool) -> None:
    if url is None and longest > MAX_MODEL_LEN - _MARGIN:
        raise typer.BadParameter(
            f"the server started here has room for {MAX_MODEL_LEN - _MARGIN} tokens; got "
            f"{longest}. Start your own and give its --url",
            param_hint="--longest",
        )
    if url is not None and speculative:
        raise typer.BadParameter(
            "whether your server drafts is decided where it is started", param_hint="--speculative"
        )
    if url is None and constructed:
        raise typer.BadParameter(
            "the server started here always serves it", param_hint="--constructed"
        )


class _Book:
    """The run in its file.

    Parameters
    ----------
    file : None to keep it in memory alone
    settings : what the run depends on; a file made with others is refused

    Raises
    ------
    typer.BadParameter : the file holds something else.
    """

    def __init__(self, file: Path | None, settings: Mapping[str, Any]) -> None:
        from m3_plugin.soak.record import Run

        self.file = file
        self.settings = dict(settings)
        self.run = Run()
        if file is None or not file.exists():
            return
        with call("--output", ValueError):
            stored = _stored(file)
            for name, value in self.settings.items():
                if (made := stored["settings"].get(name)) != value:
                    raise ValueError(
                        f"{file} was made with {name} {made}, this run has {value}; "
                        "give another --output"
                    )
            self.run = Run.from_dict(stored)

    def as_dict(self) -> dict[str, Any]:
        """JSON form of what is known so far."""
        findings = self.run.findings(largest_slope=self.settings["max_slope"])
        return {
            "right": not findings,
            "findings": findings,
            "settings": self.settings,
            **self.run.as_dict(),
        }

    def save(self) -> None:
        """Write the file, if there is one, in one step."""
        if self.file is None:
            return
        text = json.dumps(envelope(COMMAND, self.as_dict()), indent=1)
        part = self.file.with_suffix(f"{self.file.suffix}.part")
        part.write_text(text + "\n")
        os.replace(part, self.file)


def _stored(file: Path) -> dict[str, Any]:
    """A file of `--output`.

    Raises
    ------
    ValueError : it is none.
    """
    try:
        stored = json.loads(file.read_text())
        if stored["schema"] != f"m3-plugin/{COMMAND}/1":
            raise KeyError(stored["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of this command: {error}") from None
    return stored


@dataclass(frozen=True)
class _Keeper:
    """Starts servers, or takes the given one, and makes clients of them."""

    url: str | None
    framework: Framework | None
    settings: Mapping[str, Any]
    model: str | None
    api_key: str | None
    mixture: Mixture
    timeout_s: float
    log: Path | None
    console: Console

    @contextmanager
    def serving(self, *, drafts: bool) -> Iterator[tuple[Target, Driver]]:
        """A server while the context lasts, and its clients."""
        with self._target(drafts=drafts) as target:
            yield target, self._driver(target)

    def _driver(self, target: Target) -> Driver:
        from openai import APIConnectionError, APIStatusError

        from m3_plugin.soak.driver import Driver
        from m3_plugin.soak.judging import Model
        from m3_plugin.soak.needles import ConstructedNeedles

        client = openai_client(target.url, timeout_s=self.timeout_s, api_key=self.api_key)
        try:
            served = client.models.list().data
            name = self.model or served[0].id
            needles: Needles = (
                ConstructedNeedles()
                if self.settings["needles"] == "constructed"
                else _text_needles(client, name)
            )
        except APIConnectionError as error:
            raise ServerFailed(
                f"no answer from {target.url}: {error}; is the server running?"
            ) from None
        except APIStatusError as error:
            raise ServerFailed(f"{target.url} refused a request: {error.message}") from None
        extra = next((entry.model_extra for entry in served if entry.id == name), None) or {}
        room = int(extra.get("max_model_len") or MAX_MODEL_LEN)
        if self.settings["longest"] + _MARGIN > room:
            raise ServerFailed(
                f"{target.url} takes {room} tokens; give a --longest of at most {room - _MARGIN}"
            )
        return Driver(
            target.url,
            Model(name, room),
            mixture=self.mixture,
            needles=needles,
            concurrency=self.settings["concurrency"],
            timeout_s=self.timeout_s,
            api_key=self.api_key,
            reset_path=target.reset_path,
        )

    @contextmanager
    def _target(self, *, drafts: bool) -> Iterator[Target]:
        if self.url is not None:
            address = self.url.rstrip("/").removesuffix("/v1")
            yield Target(address, processes=lambda: (), gone=lambda: _silent(address))
            return
        from m3_plugin.soak.processes import processes_of_session
        from m3_plugin.testing.constructed import ConstructedCheckpoint

        host = host_to_start(self.framework)
        with tempfile.TemporaryDirectory(prefix="m3-plugin-soak-") as folder:
            scratch = Path(folder)
            checkpoint = ConstructedCheckpoint(mtp=self.settings["speculative"]).write(
                scratch / "checkpoint"
            )
            port = free_port()
            with ServerProcess(
                host.command(checkpoint, port, self._options(host, checkpoint, drafts=drafts)),
                port=port,
                log=self._log_of(drafts) or scratch / "server.log",
                environment={
                    **_GIVE_BACK,
                    **host.environment(scratch),
                    "VLLM_SERVER_DEV_MODE": "1",
                },
            ) as server:
                with self.console.status(f"starting {host.title}"):
                    server.wait_until_ready()

                def gone() -> str | None:
                    code = server.process.poll()
                    if code is None:
                        return _silent(server.url)
                    return f"ended with {code}: {server.log_tail(lines=1)}"

                yield Target(
                    server.url,
                    processes=lambda: processes_of_session(server.process.pid),
                    gone=gone,
                    reset_path=host.reset_path,
                )

    def _options(self, host: Host, checkpoint: Path, *, drafts: bool) -> tuple[str, ...]:
        room = self.settings["longest"] + _MARGIN
        return (
            *host.options,
            *host.load_options(room, int(_CACHE_SHARE * room), self.settings["concurrency"]),
            *(host.speculative_options(checkpoint) if drafts else ()),
        )

    def _log_of(self, drafts: bool) -> Path | None:
        """A log of its own for the server that drafts."""
        if self.log is None or not drafts:
            return self.log
        return self.log.with_name(f"{self.log.name}.speculative")


def _text_needles(client: Any, model: str) -> Needles:
    """Needles in prose, of lengths that the server's own tokenizer counts."""
    from m3_plugin.cli.evaluate.haystack import TextHaystack
    from m3_plugin.soak.needles import TextNeedles

    def count(text: str) -> int:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], max_tokens=1, temperature=0
        )
        return reply.usage.prompt_tokens

    haystack = TextHaystack(count)

    def question(tokens: int, depth: float, seed: int) -> tuple[str, str, int]:
        found = haystack.question(context=tokens, depth=depth, seed=seed)
        return found.text, found.expected, found.max_tokens

    return TextNeedles(question)


def _silent(url: str) -> str | None:
    """Why a server does not answer, None if it does."""
    import httpx

    said = ""
    for _ in range(5):
        try:
            if httpx.get(f"{url}/health", timeout=30, trust_env=False).is_success:
                return None
            said = "its /health is not 200"
        except httpx.HTTPError as error:
            said = f"/health: {type(error).__name__}: {error}"
        time.sleep(1)
    return said


def _fill(keeper: _Keeper, book: _Book, minutes: int) -> None:
    """Go on until the run has so many minutes, or its server is gone."""
    run = book.run
    run.ended = ""
    halves = [-(-minutes // 2), minutes] if book.settings["speculative"] else [minutes]
    for drafts, end in enumerate(halves):
        if len(run.minutes) >= end or run.ended:
            continue
        with keeper.serving(drafts=bool(drafts)) as (target, driver):
            run.servers += 1
            with _Screen(keeper.console, run, minutes) as screen:
                while (left := end - len(run.minutes)) > 0 and not run.ended:
                    minutes_to_idle = min(left, book.settings["idle_every"])
                    _Stretch(target, driver, run, screen, drafts=bool(drafts)).go(minutes_to_idle)
                    book.save()
    book.save()


class _Screen:
    """The bar that shows how far a run is. Use as a context manager."""

    def __init__(self, console: Console, run: Run, minutes: int) -> None:
        self._run = run
        self._minutes = minutes
        self._asked = sum(minute.requests for minute in run.minutes)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[asked]} asked, {task.fields[faults]} wrong or lost"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=minutes, asked=self._asked, faults=0)

    def minute(self, done: int, *, drafts: bool) -> None:
        """Another minute begins."""
        words = f"minute {done + 1} of {self._minutes}{', drafting' if drafts else ''}"
        self._bar.update(self._task, completed=done, description=words)

    def outcome(self, outcome: Outcome) -> None:
        """A request has ended."""
        self._asked += 1
        self._bar.update(self._task, asked=self._asked, faults=len(self._run.faults))

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class _Stretch:
    """Minutes under load, then a quiet moment in which everything must be given back.

    Its minutes are added to the run when it ends, because a run that is interrupted goes on
    with the request behind the last quiet moment.
    """

    def __init__(
        self, target: Target, driver: Driver, run: Run, screen: _Screen, *, drafts: bool
    ) -> None:
        self._target = target
        self._driver = driver
        self._run = run
        self._screen = screen
        self._drafts = drafts
        self._outcomes: list[Outcome] = []
        self._before = self._count()
        self._start = time.monotonic()
        self._minutes: list[Minute] = []

    def go(self, minutes: int) -> None:
        """Load the server for so many minutes."""
        from m3_plugin.soak.record import Counters

        self._begin_minute()
        self._run.next_number = asyncio.run(self._load(minutes))
        self._run.ended = self._target.gone() or ""
        after = (
            Counters(None, None, None) if self._run.ended else _quiet(self._target, self._driver)
        )
        self._end_minute(after, self._target.processes(), idle=not self._run.ended)
        self._run.minutes += self._minutes

    async def _load(self, minutes: int) -> int:
        """Keep requests under way, and end a minute whenever one is over."""

        async def clock() -> None:
            for _ in range(minutes - 1):
                await asyncio.sleep(_MINUTE_S)
                after = await asyncio.to_thread(self._count)
                self._end_minute(after, self._target.processes(), idle=False)
                self._begin_minute()

        ticking = asyncio.create_task(clock())
        upcoming = await self._driver.drive(
            minutes * _MINUTE_S,
            first=self._run.next_number,
            on_outcome=self._note,
            alive=lambda: self._target.gone() is None,
        )
        # a server that is gone ends the minutes that were to come
        if self._target.gone() is not None:
            ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking
        return upcoming

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if outcome.is_fault:
            self._run.faults.append(outcome)
        self._screen.outcome(outcome)

    def _begin_minute(self) -> None:
        done = len(self._run.minutes) + len(self._minutes)
        self._screen.minute(done, drafts=self._drafts)

    def _end_minute(self, after: Counters, processes: Sequence[Process], *, idle: bool) -> None:
        """Write a minute down."""
        from m3_plugin.soak.record import Minute

        outcomes, self._outcomes = self._outcomes, []
        before, self._before = self._before, after
        start, self._start = self._start, time.monotonic()
        self._minutes.append(
            Minute.of(
                outcomes,
                server=self._run.servers - 1,
                drafts=self._drafts,
                idle=idle,
                seconds=self._start - start,
                before=before,
                after=after,
                processes=processes,
            )
        )

    def _count(self) -> Counters:
        return counters(exposition(self._target.url), self._target.url)


def _quiet(target: Target, driver: Driver) -> Counters:
    """The counters once nobody asks any more: a server counts after it has answered."""
    deadline = time.monotonic() + _SETTLING_S
    while True:
        # a request of its own: pages of a client that went away are counted with the next step
        asyncio.run(driver.probe())
        now = counters(exposition(target.url), target.url)
        if not now.used or time.monotonic() > deadline:
            return now
        time.sleep(1)


def counters(text: str, url: str) -> Counters:
    """What a host's `/metrics` says, by the names of either host.

    Parameters
    ----------
    text : the exposition
    url : of the server; SGLang's gauges lag behind, so it is asked for its load
    """
    from m3_plugin.soak.record import Counters

    if "vllm:" in text:
        return Counters(
            preemptions=total(text, "vllm:num_preemptions_total"),
            hit_tokens=total(text, "vllm:prefix_cache_hits_total"),
            used=total(text, "vllm:kv_cache_usage_perc"),
        )
    if "sglang:" in text:
        return Counters(
            preemptions=total(text, "sglang:num_retracted_requests_total"),
            hit_tokens=total(text, "sglang:cached_tokens_total"),
            used=_sglang_load(url),
        )
    return Counters(None, None, None)


def _sglang_load(url: str) -> float | None:
    import httpx

    try:
        loads = httpx.get(f"{url}/v1/loads", timeout=60, trust_env=False).json()["loads"]
        return sum(load["num_used_tokens"] for load in loads) / sum(
            load["max_total_num_tokens"] for load in loads
        )
    except (httpx.HTTPError, ValueError, KeyError, ZeroDivisionError):
        return None


def _replay(keeper: _Keeper, stored: Mapping[str, Any], run: Run) -> None:
    """Ask what went wrong again: alone, then beside what was under way."""
    if not stored["faults"]:
        fail("nothing went wrong in that run, so there is nothing to replay", Exit.ENVIRONMENT)
    drafting = keeper.url is None and keeper.settings["speculative"]
    for drafts in (False, True) if drafting else (False,):
        with keeper.serving(drafts=drafts) as (_, driver):
            run.servers += 1
            for fault in stored["faults"]:
                for numbers in ((fault["number"],), (*fault["beside"], fault["number"])):
                    _ask_again(keeper.console, driver, run, numbers)


def _ask_again(console: Console, driver: Driver, run: Run, numbers: tuple[int, ...]) -> None:
    outcomes = asyncio.run(driver.all_at_once(numbers))
    for outcome in outcomes:
        said = f"{outcome.number} {outcome.kind}: {outcome.verdict} {outcome.detail}"
        console.print(said, markup=False)
    run.faults += [outcome for outcome in outcomes if outcome.is_fault]
    run.next_number += len(numbers)


def _print(book: _Book) -> None:
    run = book.run
    table = Table(title="soak", box=SIMPLE_HEAD)
    for column in ("minute", "asked", "right", "refused", "bad", "tokens/s", "latency s"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("preempted", "held", "RSS MB", "files", "threads"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, minute in enumerate(run.minutes):
        told = minute.verdicts
        tokens = minute.prompt_tokens + minute.completion_tokens
        median, most, _ = minute.latency_s or (None, None, None)
        table.add_row(
            f"{number + 1}{' drafts' if minute.drafts else ''}",
            str(minute.requests),
            str(told.get("right", 0)),
            str(told.get("refused", 0)),
            str(told.get("wrong", 0) + told.get("lost", 0)),
            f"{tokens / minute.seconds:,.0f}",
            f"{_or_dash(median, '.1f')} / {_or_dash(most, '.1f')}",
            _or_dash(minute.preemptions, ",.0f"),
            _or_dash(minute.used_when_idle, ".1%"),
            *(f"{value:,.0f}" if minute.processes else "-" for value in minute.totals.values()),
        )
    # a pipe has no width, and columns that are cut say nothing
    console = Console() if Console().is_terminal else Console(width=130)
    console.print(table)
    console.print(
        "latency: median / 95th percentile of right answers; asked: with clients that left"
    )
    findings = run.findings(largest_slope=book.settings["max_slope"])
    for finding in findings[:20]:
        console.print(finding, style="red", markup=False)
    if not findings:
        console.print("nothing wrong, nothing lost", style="green")
    elif run.faults:
        console.print(
            "again: m3-plugin soak --replay FILE, with the file of --output", markup=False
        )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plot(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: tuple[tuple[str, Callable[[Minute], float | None]], ...] = (
        ("requests", lambda minute: minute.requests),
        ("tokens/s", lambda m: (m.prompt_tokens + m.completion_tokens) / m.seconds),
        ("median latency, s", lambda m: m.latency_s[0] if m.latency_s else None),
        ("resident memory, MB", lambda m: m.totals["rss_mb"] if m.idle and m.processes else None),
        ("open files", lambda m: m.totals["files"] if m.processes else None),
        ("threads", lambda m: m.totals["threads"] if m.processes else None),
    )
    slopes = {entry["server"]: entry for entry in run.slopes()}
    names = {"resident memory, MB": "rss_mb", "open files": "files", "threads": "threads"}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for axis, (title, value) in zip(axes.flat, panels, strict=True):
        axis.set_title(title)
        axis.set_xlabel("minute")
        for server in slopes:
            own = [(i + 1, value(m)) for i, m in enumerate(run.minutes) if m.server == server]
            seen = [(at, found) for at, found in own if found is not None]
            rate = slopes[server].get(names.get(title, ""))
            axis.plot(
                [at for at, _ in seen],
                [found for _, found in seen],
                ".-",
                label=None if rate is None else f"{rate:+.2f} a minute",
            )
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
