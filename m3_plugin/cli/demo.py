"""`m3-plugin demo`: the main job on this machine, small enough for a laptop's CPU.

Writes the constructed checkpoint (its answers are known), serves it with the real host through the
plugin, asks over HTTP and compares. Each question can be answered only by retrieving the right
block of the context in the right attention group.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from m3_plugin.serving import ServerFailed, ServerProcess, free_port, vllm_command

MODEL_NAME = "minimax-m3-constructed"
MAX_MODEL_LEN = 32768

GPU_COMMAND = """vllm serve MiniMaxAI/MiniMax-M3-MXFP8 --tensor-parallel-size 8 \\
    --max-model-len 131072 --enable-auto-tool-choice \\
    --tool-call-parser minimax_m3 --reasoning-parser minimax_m3"""


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

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.received == self.expected


def demo(
    long_tokens: Annotated[
        int, typer.Option(min=2048, max=MAX_MODEL_LEN - 1024, help="Tokens of the long prompt.")
    ] = 16384,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="Write the server's log to this file and keep it.")
    ] = None,
) -> None:
    """Serve the constructed checkpoint on a real vLLM and check its answers over HTTP."""
    # progress goes to stderr so that --json leaves nothing but JSON on stdout
    console = Console(stderr=True)
    try:
        answers = _run(long_tokens=long_tokens, log=log, console=console)
    except ServerFailed as failure:
        console.print(str(failure), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    right = all(answer.right for answer in answers)
    if as_json:
        typer.echo(json.dumps({"right": right, "answers": [_as_dict(a) for a in answers]}))
    else:
        _report(answers, right=right)
    raise typer.Exit(0 if right else 1)


def _run(*, long_tokens: int, log: Path | None, console: Console) -> list[Answer]:
    from m3_plugin.testing.constructed import ConstructedCheckpoint

    with tempfile.TemporaryDirectory(prefix="m3-plugin-demo-") as folder:
        with _step(console, "writing the constructed checkpoint"):
            checkpoint = ConstructedCheckpoint().write(Path(folder) / "checkpoint")
        port = free_port()
        command = vllm_command(checkpoint, port=port, options=_SERVER_OPTIONS)
        server_log = log or Path(folder) / "server.log"
        with (
            ServerProcess(command, port=port, log=server_log, environment=_ENVIRONMENT) as server,
            _step(console, "starting vLLM") as say,
        ):
            server.wait_until_ready(on_wait=lambda line: say(f"starting vLLM: {line}"))
            answers = []
            for question in _questions(long_tokens):
                say(f"asking: {question.label}")
                answers.append(_ask(server.url, question))
            say("stopping vLLM")
        return answers


_SERVER_OPTIONS = (
    *("--served-model-name", MODEL_NAME),
    *("--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-batched-tokens", "2048"),
    *("--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(512 << 20)),
    *("--limit-mm-per-prompt", '{"image": 2, "video": 1}'),
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    *("--tool-call-parser", "minimax_m3", "--enable-auto-tool-choice"),
    *("--reasoning-parser", "minimax_m3"),
    *("--worker-extension-cls", "m3_vllm.worker.M3WorkerExtension"),
)
_ENVIRONMENT = {
    "M3_PLUGIN_REQUIRED": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # the worker's counters are read through the development endpoint
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # every core, instead of leaving one to the API server
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
}


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


def _ask(url: str, question: Question) -> Answer:
    import httpx
    from openai import OpenAI

    def workers(method: str, *args: Any) -> Any:
        body = {"method": method, "args": list(args)}
        reply = httpx.post(f"{url}/collective_rpc", json=body, timeout=60)
        reply.raise_for_status()
        return reply.json()["results"][0]

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=0)

    def decode_seconds() -> float:
        return _metric(httpx.get(f"{url}/metrics").text, "vllm:request_decode_time_seconds_sum")

    workers("m3_record_statistics", True)
    decoded_before = decode_seconds()
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=question.messages,  # type: ignore[arg-type]
        max_tokens=question.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"chat_template_kwargs": {"thinking_mode": "disabled"}},
    )
    text, first_token, usage = "", start, None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first_token = first_token if text else time.perf_counter()
            text += chunk.choices[0].delta.content
    blocks = workers("m3_statistics")
    assert usage is not None
    details = usage.prompt_tokens_details
    # the prefill step gives the first token, every decode step one more
    decode_steps = usage.completion_tokens - 1
    decode_s = decode_seconds() - decoded_before
    return Answer(
        label=question.label,
        asked=question.asked,
        expected=question.expected,
        received=text.strip(),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else 0) or 0,
        prefill_blocks=(
            blocks["blocks_read"] - blocks["decode_blocks_read"],
            blocks["blocks_visible"] - blocks["decode_blocks_visible"],
        ),
        decode_blocks=(blocks["decode_blocks_read"], blocks["decode_blocks_visible"]),
        first_token_s=first_token - start,
        decode_ms_per_token=1e3 * decode_s / decode_steps if decode_steps else None,
    )


def _metric(exposition: str, name: str) -> float:
    """Sum of a Prometheus metric over its labels."""
    lines = exposition.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


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
    return {**asdict(answer), "right": answer.right}


def _report(answers: list[Answer], *, right: bool) -> None:
    terminal = Console()
    # a pipe or a log has no width of its own, and a narrow table cannot be read
    console = terminal if terminal.is_terminal else Console(width=130)
    table = Table(title="MiniMax-M3 (constructed checkpoint) on vLLM through m3-plugin")
    for heading in ("question", "expected", "received"):
        table.add_column(heading)
    for heading in ("prompt\ntokens", "of them\ncached", "blocks read\nprefill | decode"):
        table.add_column(heading, justify="right")
    table.add_column("first\ntoken", justify="right")
    table.add_column("decode\nms/token", justify="right")
    for answer in answers:
        decode = answer.decode_ms_per_token
        table.add_row(
            f"{answer.label}\n[dim]{answer.asked}[/dim]",
            answer.expected,
            f"[green]{answer.received}[/green]"
            if answer.right
            else f"[red]{answer.received or '(nothing)'}[/red]",
            f"{answer.prompt_tokens:,}",
            f"{answer.cached_tokens:,}",
            f"{_share(answer.prefill_blocks)} | {_share(answer.decode_blocks)}",
            f"{answer.first_token_s:.1f} s",
            f"{decode:.0f}" if decode is not None else "-",
        )
    console.print(table)
    if right:
        console.print("all answers right", style="green")
    else:
        console.print("WRONG ANSWERS", style="bold red")
    note = (
        "\n\nThis version brings CPU kernels only: on GPUs the plugin stands aside with a\n"
        "warning and vLLM's own MiniMax-M3 answers (M3_PLUGIN_REQUIRED=1 makes that an error)."
    )
    title = "the released weights on GPUs"
    console.print(Panel(GPU_COMMAND + note, title=title, expand=False, highlight=False))
