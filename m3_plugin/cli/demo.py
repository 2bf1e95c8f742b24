"""`m3-plugin demo`: the main job on this machine, small enough for a laptop's CPU.

Writes the constructed checkpoint (its answers are known), serves it with the real host through the
plugin, asks over HTTP and compares. Each question can be answered only by retrieving the right
block of the context in the right attention group.
"""

from __future__ import annotations

import base64
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from m3_plugin.cli.exits import Exit, environment
from m3_plugin.cli.fit import commands_for
from m3_plugin.cli.host_metrics import exposition, openai_client, settled, total
from m3_plugin.cli.hosts import MAX_MODEL_LEN, MODEL_NAME, Host, host_to_start
from m3_plugin.cli.options import FrameworkOption, JsonOption, OutputOption, in_a_folder
from m3_plugin.cli.outputs import deliver
from m3_plugin.host.serving import ServerFailed, ServerProcess, free_port


@dataclass(frozen=True)
class Question:
    """One chat request whose answer is known."""

    label: str
    asked: str
    messages: list[dict[str, Any]]
    expected: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back for a question.

    `draft_steps` counts steps that verified drafts, `drafted` and `accepted` their tokens.
    `prefill_blocks` and `decode_blocks` are (read, visible): blocks the MSA layers attended, and
    blocks dense layers would have attended, as counted by the workers.
    """

    label: str
    asked: str
    expected: str
    received: str
    prompt_tokens: int
    cached_tokens: int
    prefill_blocks: tuple[int, int]
    decode_blocks: tuple[int, int]
    first_token_s: float
    decode_ms_per_token: float | None
    draft_steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of draft tokens that were accepted, None without drafts."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float:
        """Tokens a decode step yields: its own one and the accepted drafts."""
        return 1 + self.accepted / self.draft_steps if self.draft_steps else 1.0

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.received == self.expected


def demo(
    framework: FrameworkOption = None,
    long_tokens: Annotated[
        int, typer.Option(min=2048, max=MAX_MODEL_LEN - 1024, help="Tokens of the long prompt.")
    ] = 16384,
    speculative: Annotated[
        bool,
        typer.Option("--speculative", help="Serve a second time with drafts (MTP), and compare."),
    ] = False,
    as_json: JsonOption = False,
    output: OutputOption = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Write the server's log to this file and keep it; with --speculative the second "
            "server's to FILE.speculative.",
            callback=in_a_folder,
        ),
    ] = None,
) -> None:
    """See it work: serve a tiny M3 here, ask it questions with known answers, compare.

    Needs a host, and no weights, GPU or network.
    """
    # progress goes to stderr so that --json leaves nothing but JSON on stdout
    console = Console(stderr=True)
    with environment(LookupError, ServerFailed):
        host = host_to_start(framework)
        answers, drafted = _run(
            host, long_tokens=long_tokens, speculative=speculative, log=log, console=console
        )
    right = all(answer.right for answer in (*answers, *drafted))
    if not as_json:
        _report(answers, drafted, host=host, right=right)
    deliver("demo", as_dict(answers, drafted, right=right), as_json=as_json, output=output)
    raise typer.Exit(Exit.of(right))


def as_dict(answers: list[Answer], drafted: list[Answer], *, right: bool) -> dict[str, Any]:
    """JSON form; `speculative` is empty where nothing was drafted."""
    return {
        "right": right,
        "answers": [_as_dict(answer) for answer in answers],
        "speculative": [_as_dict(answer) for answer in drafted],
    }


def _run(
    host: Host, *, long_tokens: int, speculative: bool, log: Path | None, console: Console
) -> tuple[list[Answer], list[Answer]]:
    """Answers of the plain server, and of one that drafts where that is asked for."""
    from m3_plugin.testing.constructed import ConstructedCheckpoint

    with tempfile.TemporaryDirectory(prefix="m3-plugin-demo-") as folder:
        with _step(console, "writing the constructed checkpoint"):
            checkpoint = ConstructedCheckpoint(mtp=speculative).write(Path(folder) / "checkpoint")
        runs: list[list[Answer]] = []
        drafting = host.speculative_options(checkpoint)
        for options in [(), drafting] if speculative else [()]:
            scratch = Path(folder) / ("speculative" if options else "plain")
            scratch.mkdir()
            kept = _log_of(log, speculative=bool(options))
            with _served(host, checkpoint, options, scratch, log=kept, console=console) as ask:
                runs.append([ask(question) for question in _questions(long_tokens)])
        return runs[0], runs[1] if speculative else []


def _log_of(log: Path | None, *, speculative: bool) -> Path | None:
    """A log of its own for each of the two servers."""
    return log.with_name(f"{log.name}.speculative") if log and speculative else log


@contextmanager
def _served(
    host: Host,
    checkpoint: Path,
    options: tuple[str, ...],
    scratch: Path,
    *,
    log: Path | None,
    console: Console,
) -> Iterator[Callable[[Question], Answer]]:
    """A running server, as a function that asks it a question."""
    port = free_port()
    with (
        ServerProcess(
            host.command(checkpoint, port, (*host.options, *options)),
            port=port,
            log=log or scratch / "server.log",
            environment=host.environment(scratch),
        ) as server,
        _step(console, f"starting {host.title}") as say,
    ):
        server.wait_until_ready(on_wait=lambda line: say(f"starting {host.title}: {line}"))

        def ask(question: Question) -> Answer:
            say(f"asking: {question.label}")
            return _ask(server.url, question, host=host)

        yield ask
        say(f"stopping {host.title}")


def _questions(long_tokens: int) -> Iterator[Question]:
    from m3_plugin.testing.prompts import needle_prompt, picture_prompt

    for label, seed, tokens in (
        ("short chain", 1, 1536),
        ("another chain", 2, 4096),
        ("long chain", 3, long_tokens),
        ("long chain again", 3, long_tokens),
    ):
        needle = needle_prompt(seed, num_tokens=tokens)
        yield Question(
            label=label,
            asked=needle.question.strip(),
            messages=needle.messages(),
            expected=needle.expected_text.strip(),
            max_tokens=needle.max_tokens,
        )
    colours = ("blue", "yellow")
    picture = picture_prompt(colours, ask=1)
    yield Question(
        label="two pictures",
        asked="colour of the second picture?",
        messages=[{"role": "user", "content": list(_with_pictures(picture.content, colours))}],
        expected=picture.expected_text.strip(),
        max_tokens=picture.max_tokens,
    )


def _with_pictures(parts: tuple[dict[str, str], ...], colours: tuple[str, ...]) -> Iterator[dict]:
    from PIL import Image

    from m3_plugin.testing.prompts import colour_rgb

    pictures = iter(colours)
    for part in parts:
        if part["type"] != "image":
            yield part
            continue
        data = io.BytesIO()
        Image.new("RGB", (112, 112), colour_rgb(next(pictures))).save(data, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        yield {"type": "image_url", "image_url": {"url": url}}


@dataclass(frozen=True)
class _Counters:
    """The server's own counts up to now."""

    requests: float
    decode_s_per_token: float
    prefill_blocks: tuple[float, float]
    decode_blocks: tuple[float, float]
    drafts: tuple[float, float, float]


def _read_counters(url: str, *, host: Host) -> _Counters:
    text = exposition(url)
    time_per_token = f"{host.metrics}:request_time_per_output_token_seconds"

    def blocks(phase: str) -> tuple[float, float]:
        label = f'phase="{phase}"'
        return (
            total(text, "m3_plugin:msa_blocks_read_total", label=label),
            total(text, "m3_plugin:msa_blocks_visible_total", label=label),
        )

    return _Counters(
        requests=total(text, f"{time_per_token}_count"),
        decode_s_per_token=total(text, f"{time_per_token}_sum"),
        prefill_blocks=blocks("prefill"),
        decode_blocks=blocks("decode"),
        drafts=(
            total(text, host.draft_counters.steps),
            total(text, host.draft_counters.drafted),
            total(text, host.draft_counters.accepted),
        ),
    )


def _drafts(
    before: _Counters, after: _Counters, details: Mapping[str, Any], *, host: Host
) -> tuple[int, int, int]:
    """Steps that verified drafts, draft tokens, and accepted ones, of one answer.

    Parameters
    ----------
    details : what the answer itself told, empty where the host only counts in its metrics
    """
    names = host.draft_counters
    counted = (int(now - then) for now, then in zip(after.drafts, before.drafts, strict=True))
    steps, drafted, accepted = counted
    if names.details:
        return steps, details.get(names.drafted, 0), details.get(names.accepted, 0)
    return steps, drafted, accepted


def _ask(url: str, question: Question, *, host: Host) -> Answer:
    client = openai_client(url, timeout_s=1800)
    before = _read_counters(url, host=host)
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=question.messages,  # type: ignore[arg-type]
        max_tokens=question.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "chat_template_kwargs": {"thinking_mode": "disabled"},
            **host.draft_counters.asked_by,
        },
    )
    text, first_token, usage, draft_details = "", start, None, {}
    for chunk in stream:
        usage = chunk.usage or usage
        draft_details = _found(chunk.model_extra, host.draft_counters.details) or draft_details
        if chunk.choices and chunk.choices[0].delta.content:
            first_token = first_token if text else time.perf_counter()
            text += chunk.choices[0].delta.content
    after = settled(
        lambda: _read_counters(url, host=host), lambda now: now.requests > before.requests
    )
    assert usage is not None
    details = usage.prompt_tokens_details
    counted = after.requests > before.requests
    steps, drafted, accepted = _drafts(before, after, draft_details, host=host)
    return Answer(
        label=question.label,
        asked=question.asked,
        expected=question.expected,
        received=text.strip(),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else 0) or 0,
        prefill_blocks=_difference(after.prefill_blocks, before.prefill_blocks),
        decode_blocks=_difference(after.decode_blocks, before.decode_blocks),
        first_token_s=first_token - start,
        decode_ms_per_token=1e3 * (after.decode_s_per_token - before.decode_s_per_token)
        if counted
        else None,
        draft_steps=steps,
        drafted=drafted,
        accepted=accepted,
    )


def _found(extra: Mapping[str, Any] | None, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """The object these keys lead to, empty if there is none."""
    found: Any = extra if keys else None
    for key in keys:
        found = (found or {}).get(key)
    return found or {}


def _difference(after: tuple[float, float], before: tuple[float, float]) -> tuple[int, int]:
    return int(after[0] - before[0]), int(after[1] - before[1])


@contextmanager
def _step(console: Console, title: str) -> Iterator[Any]:
    """A spinner with a title and the time passed; yields a function that changes the title."""
    with Progress(
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    ) as progress:
        task = progress.add_task(title, total=None)

        def say(text: str) -> None:
            progress.update(task, description=text[: max(20, console.width - 20)])

        yield say


def _share(blocks: tuple[int, int]) -> str:
    read, visible = blocks
    return f"{read / visible:.1%}" if visible else "-"


def _as_dict(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.label.replace(" ", "_"),
        **asdict(answer),
        "right": answer.right,
        "acceptance": answer.acceptance,
        "tokens_per_step": answer.tokens_per_step,
    }


def _report(answers: list[Answer], drafted: list[Answer], *, host: Host, right: bool) -> None:
    terminal = Console()
    # a pipe or a log has no width of its own, and a narrow table cannot be read
    console = terminal if terminal.is_terminal else Console(width=130)
    table = Table(title=f"MiniMax-M3 (constructed checkpoint) on {host.title} through m3-plugin")
    for heading in ("question", "expected", "received"):
        table.add_column(heading)
    for heading in ("prompt\ntokens", "of them\ncached", "blocks read\nprefill | decode"):
        table.add_column(heading, justify="right")
    table.add_column("first\ntoken", justify="right")
    table.add_column("decode\nms/token", justify="right")
    for answer in answers:
        decode = answer.decode_ms_per_token
        table.add_row(
            Text(answer.label + "\n").append(answer.asked, style="dim"),
            Text(answer.expected),
            # a wrong answer may hold anything, what means a colour too
            Text(answer.received or "(nothing)", style="green" if answer.right else "red"),
            f"{answer.prompt_tokens:,}",
            f"{answer.cached_tokens:,}",
            f"{_share(answer.prefill_blocks)} | {_share(answer.decode_blocks)}",
            f"{answer.first_token_s:.1f} s",
            f"{decode:.0f}" if decode is not None else "-",
        )
    console.print(table)
    if drafted:
        console.print(_comparison(answers, drafted))
    if right:
        console.print("all answers right", style="green")
    else:
        console.print("WRONG ANSWERS", style="bold red")
    note = (
        "\n\nThe Triton kernels have not run on a GPU yet: at start they are compared with the\n"
        "oracle, and nothing is served if they are wrong. There, `m3-plugin check` says more."
    )
    commands = commands_for("MiniMaxAI/MiniMax-M3-MXFP8", "H100", tp_size=8, context=131_072)
    title = "the released weights on 8 x H100; for other machines: m3-plugin fit"
    console.print(
        Panel(Text(commands[host.title] + note), title=title, expand=False, highlight=False)
    )


def _comparison(answers: list[Answer], drafted: list[Answer]) -> Table:
    """The same questions with and without drafts."""
    table = Table(title="drafting 3 tokens with the MTP module")
    table.add_column("question")
    for heading in (
        "accepted",
        "tokens per step\nplain | drafting",
        "decode ms/token\nplain | drafting",
    ):
        table.add_column(heading, justify="right")
    table.add_column("answer")
    for plain, other in zip(answers, drafted, strict=True):
        times = [
            "-" if answer.decode_ms_per_token is None else f"{answer.decode_ms_per_token:.0f}"
            for answer in (plain, other)
        ]
        table.add_row(
            Text(other.label),
            f"{other.accepted} of {other.drafted}",
            f"{plain.tokens_per_step:.1f} | {other.tokens_per_step:.1f}",
            " | ".join(times),
            "[green]the same[/green]"
            if other.received == plain.received
            else "[red]DIFFERENT[/red]",
        )
    return table
