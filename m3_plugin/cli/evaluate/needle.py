"""`m3-plugin eval needle`: a grid of context lengths and depths, drawn as the familiar heat map."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from m3_plugin.cli.bench.report import numbers, progress_bar
from m3_plugin.cli.evaluate.haystack import ConstructedHaystack, Haystack, TextHaystack
from m3_plugin.cli.exits import Exit, call, environment
from m3_plugin.cli.host_metrics import openai_client
from m3_plugin.cli.hosts import MAX_MODEL_LEN, host_to_start, require_libraries
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

COMMAND = "eval-needle"


class Needles(StrEnum):
    """What stands in the haystack."""

    constructed = "constructed"
    text = "text"


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    context: int
    depth: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What the server said in one cell. `depth` is the wanted one, `found_at` the real one.

    `dense` says that it is the answer of a model that reads every block.
    """

    context: int
    depth: float
    seed: int
    found_at: float
    prompt_tokens: int
    expected: str
    received: str
    right: bool
    seconds: float
    dense: bool = False


class Grid:
    """Results by cell, kept in a file after each of them so that a broken run can go on.

    Parameters
    ----------
    file : None to keep them in memory alone
    settings : what the results depend on; a file made with others is refused

    Raises
    ------
    ValueError : the file holds something else.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file = file
        self.settings = settings
        self.results: dict[Cell, Result] = {}
        if file is None or not file.exists():
            return
        try:
            stored = json.loads(file.read_text())
            results = [Result(**entry) for entry in stored["results"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no results of this command: {error}") from None
        if stored["settings"] != settings:
            raise ValueError(
                f"{file} was made with {stored['settings']}, this run has {settings}; "
                "give another --output"
            )
        self.results = {Cell(r.context, r.depth, r.seed): r for r in results}

    def add(self, result: Result) -> None:
        """Keep a result, in memory and on disk."""
        self.results[Cell(result.context, result.depth, result.seed)] = result
        if self.file is None:
            return
        body = as_dict(self.settings, list(self.results.values()))
        text = json.dumps(envelope(COMMAND, body), indent=1)
        # replaced in one step: a run that is broken off leaves the old file or the new one
        part = self.file.with_suffix(f"{self.file.suffix}.part")
        part.write_text(text + "\n")
        os.replace(part, self.file)


def as_dict(settings: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """JSON form of what is known so far."""
    return {
        "right": all(result.right for result in results),
        "settings": settings,
        "results": [asdict(result) for result in results],
    }


def needle(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    framework: FrameworkOption = None,
    model: ModelOption = None,
    needles: Annotated[
        Needles | None,
        typer.Option(
            help="text: a number in English prose, for any model (default with --url); "
            "constructed: for the checkpoint that `m3-plugin tiny` writes."
        ),
    ] = None,
    contexts: Annotated[
        str, typer.Option(help="Lengths of the prompts in tokens, with commas.")
    ] = "2048,4096,8192",
    depths: Annotated[
        str, typer.Option(help="Where the fact is hidden, in percent of the prompt, with commas.")
    ] = "0,25,50,75,100",
    repeats: Annotated[int, typer.Option(min=1, help="Questions for each length and depth.")] = 1,
    prose: Annotated[
        Path | None,
        typer.Option(
            help="Hide the number in this text file instead of our prose.",
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
    """Is a running model right? Hide a fact in long prompts, at every depth, and ask for it.

    A wrong selection of blocks shows here and nowhere else: short prompts do not need it.
    """
    console = Console(stderr=True)
    kind = needles or (Needles.constructed if url is None else Needles.text)
    cells = [
        Cell(context, depth / 100, seed)
        for context in numbers(contexts, "--contexts")
        for depth in _percents(depths)
        for seed in range(repeats)
    ]
    _require_room(cells, kind=kind, ours=url is None)
    with environment(LookupError, ServerFailed, ValueError):
        require_libraries("openai")
        with call("--output", ValueError):
            grid = Grid(output, {"needles": kind.value, "model": model, "prose": str(prose)})
        missing = [cell for cell in cells if cell not in grid.results]
        hay = None if prose is None else _read(prose)
        if missing:
            with _server(url, framework=framework, log=log, console=console) as address:
                asker = _Asker(address, model, api_key=api_key)
                _ask_all(asker, grid, missing, kind=kind, prose=hay)
    results = [grid.results[cell] for cell in cells]
    if not as_json:
        _print(results)
    body = as_dict(grid.settings, results)
    # the file has these already, and those of earlier runs
    deliver(COMMAND, body, as_json=as_json)
    if plot is not None:
        _plot(results, plot)
    raise typer.Exit(Exit.of(body["right"]))


def _require_room(cells: list[Cell], *, kind: Needles, ours: bool) -> None:
    """Refuse prompts too long for the server started here, or too short for a hidden fact."""
    if not cells:
        raise typer.BadParameter("at least one length is needed", param_hint="--contexts")
    longest = max(cell.context for cell in cells)
    if ours and longest > MAX_MODEL_LEN - 1024:
        raise typer.BadParameter(
            f"the server started here has room for {MAX_MODEL_LEN - 1024} tokens; got {longest}. "
            "Start your own and give its --url",
            param_hint="--contexts",
        )
    if kind is Needles.constructed:
        shortest = min(cell.context for cell in cells)
        with call("--contexts", ValueError):
            ConstructedHaystack().question(context=shortest, depth=0.5, seed=0)


@contextmanager
def _server(
    url: str | None, *, framework: Framework | None, log: Path | None, console: Console
) -> Iterator[str]:
    """The given server, or one that serves the constructed checkpoint while the context lasts."""
    if url is not None:
        yield url.rstrip("/").removesuffix("/v1")
        return
    from m3_plugin.testing.constructed import ConstructedCheckpoint

    chosen = host_to_start(framework)
    with tempfile.TemporaryDirectory(prefix="m3-plugin-needle-") as folder:
        scratch = Path(folder)
        with console.status("writing the constructed checkpoint"):
            checkpoint = ConstructedCheckpoint().write(scratch / "checkpoint")
        port = free_port()
        with ServerProcess(
            chosen.command(checkpoint, port, chosen.options),
            port=port,
            log=log or scratch / "server.log",
            environment=chosen.environment(scratch),
        ) as server:
            with console.status(f"starting {chosen.title}"):
                server.wait_until_ready()
            yield server.url


def _ask_all(
    asker: _Asker, grid: Grid, cells: list[Cell], *, kind: Needles, prose: str | None
) -> None:
    from openai import APIConnectionError, APIStatusError

    url = asker.url
    try:
        haystack: Haystack = (
            ConstructedHaystack()
            if kind is Needles.constructed
            else TextHaystack(asker.count_tokens, prose=prose)
        )
        with progress_bar() as progress:
            task = progress.add_task("needles", total=len(cells))
            for cell in cells:
                progress.update(task, description=f"{cell.context:,} at {cell.depth:.0%}")
                grid.add(asker.ask(haystack, cell))
                progress.advance(task)
    except APIConnectionError as error:
        raise ServerFailed(f"no answer from {url}: {error}; is the server running?") from None
    except APIStatusError as error:
        kept = f". What was asked before is kept in {grid.file}" if grid.file else ""
        key = "; give its key with --api-key or OPENAI_API_KEY" if error.status_code == 401 else ""
        raise ServerFailed(f"{url} refused a request: {error.message}{key}{kept}") from None


def _read(prose: Path) -> str:
    try:
        return prose.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"{prose} must be UTF-8 text: {error}", param_hint="--prose"
        ) from None


class _Asker:
    """Chat requests to one model."""

    def __init__(self, url: str, model: str | None, *, api_key: str | None = None) -> None:
        self.url = url
        self.client = openai_client(url, timeout_s=3600, api_key=api_key)
        self._model = model

    @property
    def model(self) -> str:
        if self._model is None:
            self._model = self.client.models.list().data[0].id
        return self._model

    def ask(self, haystack: Haystack, cell: Cell) -> Result:
        question = haystack.question(context=cell.context, depth=cell.depth, seed=cell.seed)
        start = time.perf_counter()
        reply = self._chat(question.text, max_tokens=question.max_tokens)
        seconds = time.perf_counter() - start
        received = reply.choices[0].message.content or ""
        return Result(
            context=cell.context,
            depth=cell.depth,
            seed=cell.seed,
            found_at=round(question.depth, 4),
            prompt_tokens=reply.usage.prompt_tokens,
            expected=question.expected,
            received=received.strip(),
            right=question.is_right(received),
            seconds=round(seconds, 3),
            dense=received.strip() == question.dense,
        )

    def count_tokens(self, text: str) -> int:
        return self._chat(text, max_tokens=1).usage.prompt_tokens

    def _chat(self, text: str, *, max_tokens: int) -> Any:
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"chat_template_kwargs": {"thinking_mode": "disabled"}},
        )


def _percents(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"not numbers: {text!r}", param_hint="--depths") from None
    if not found or any(not 0 <= depth <= 100 for depth in found):
        raise typer.BadParameter(f"must be within 0..100: {text!r}", param_hint="--depths")
    return found


def shares(results: list[Result]) -> dict[tuple[float, int], float]:
    """(depth, context) -> share of right answers."""
    cells: dict[tuple[float, int], list[bool]] = {}
    for result in results:
        cells.setdefault((result.depth, result.context), []).append(result.right)
    return {cell: sum(right) / len(right) for cell, right in cells.items()}


def _print(results: list[Result]) -> None:
    found = shares(results)
    table = Table(title="needles found")
    table.add_column("depth", justify="right")
    contexts = sorted({context for _, context in found})
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for depth in sorted({depth for depth, _ in found}):
        row = [found[depth, context] for context in contexts]
        table.add_row(f"{depth:.0%}", *(f"[{'green' if s == 1 else 'red'}]{s:.0%}[/]" for s in row))
    Console().print(table)
    for wrong in [result for result in results if not result.right][:5]:
        Console().print(
            f"{wrong.context:,} tokens at {wrong.depth:.0%}: expected {wrong.expected!r}, "
            f"got {wrong.received[:80]!r}",
            style="red",
            markup=False,
        )
    if dense := sum(result.dense for result in results):
        Console().print(
            f"{dense} of {len(results)} answers are those of dense attention: the server reads "
            "every block",
            style="red",
        )


def _plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = shares(results)
    contexts = sorted({context for _, context in found})
    depths = sorted({depth for depth, _ in found})
    figure, axis = plt.subplots(figsize=(2.6 + 0.9 * len(contexts), 1.8 + 0.45 * len(depths)))
    image = axis.imshow(
        [[found[depth, context] for context in contexts] for depth in depths],
        aspect="auto",
        # pale enough for black numbers
        cmap="RdYlGn",
        alpha=0.7,
        vmin=0,
        vmax=1,
    )
    for row, depth in enumerate(depths):
        for column, context in enumerate(contexts):
            axis.text(column, row, f"{found[depth, context]:.0%}", ha="center", va="center")
    # white lines between the cells
    axis.set_xticks([column - 0.5 for column in range(1, len(contexts))], minor=True)
    axis.set_yticks([row - 0.5 for row in range(1, len(depths))], minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="minor", length=0)
    axis.set_title("needles found")
    axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], rotation=45)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axis, label="share of right answers")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
