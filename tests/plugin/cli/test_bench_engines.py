"""`m3-plugin bench cpu --peers`: who is asked what, in which order, and what becomes of it.

Real engines are measured in `tests/integrations/vllm/test_llama_cpp.py`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.bench.engines import (
    OUTPUT_TOKENS,
    Contestant,
    Engine,
    EngineRow,
    Engines,
    Plan,
    Prompts,
    ask,
    panels_of,
    parts_of_a_step,
    print_engines,
    take_turns,
)
from m3_plugin.cli.bench.llama_cpp import VARIANTS, find_server, version_of
from m3_plugin.cli.bench.report import plot_panels
from m3_plugin.cli.bench.serve import ClientFailed, Decoding
from tests.console import in_one_line

PLAN = Plan(contexts=(20, 40), chunk=8, rounds=3, limit_s=60, threads=1)


@contextmanager
def answering(
    first_s: Callable[[list[int]], float], *, tokens: int = OUTPUT_TOKENS, token_s: float = 0.0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A completions server with the timing of somebody's choice; yields its URL and what it got."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            time.sleep(first_s(body["prompt"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for at in range(tokens + 1):
                time.sleep(token_s if 0 < at < tokens else 0)
                # the last piece has no text, only the reason of the end
                choice = {"index": 0, "text": " the" if at < tokens else "", "finish_reason": None}
                line = json.dumps({"id": "1", "object": "text_completion", "choices": [choice]})
                self.wfile.write(f"data: {line}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_times_are_those_of_the_first_and_of_the_further_tokens() -> None:
    peer = Contestant("peer", "", "m3")
    with answering(lambda prompt: 0.2, token_s=0.01) as (url, bodies):
        # a busy machine adds to both
        replies = [ask(replace(peer, url=url), [30, 31], limit_s=10) for _ in range(3)]
    assert 200 <= min(reply.first_ms for reply in replies) < 200 + 10 * OUTPUT_TOKENS
    assert 10 <= min(reply.token_ms for reply in replies) < 40
    body = bodies[0]
    assert body["prompt"] == [30, 31]
    assert body["ignore_eos"] is True
    assert body["max_tokens"] == OUTPUT_TOKENS
    assert list(body["logit_bias"].values()) == [100]


def test_an_answer_that_ends_early_is_no_measurement() -> None:
    with (
        answering(lambda prompt: 0, tokens=1) as (url, _),
        pytest.raises(ClientFailed, match=f"peer sent 1 of {OUTPUT_TOKENS} tokens"),
    ):
        ask(Contestant("peer", url, "m3"), [30], limit_s=10)


def test_only_the_last_chunk_of_a_prompt_is_new() -> None:
    prompts = Prompts(1024, 512)
    first, second = prompts.with_new_chunk(0), prompts.with_new_chunk(1)
    assert len(prompts.whole) == len(first) == len(second) == 1024
    assert prompts.whole[:512] == first[:512] == second[:512]
    assert len({tuple(p[512:]) for p in (prompts.whole, first, second)}) == 3
    # no prompt begins as one of another context does, or a prefix cache would answer
    assert Prompts(2048, 512).whole[:128] != prompts.whole[:128]


def test_contestants_take_turns_with_the_same_prompts() -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[list[int]], float]:
        def first_s(prompt: list[int]) -> float:
            order.append(f"{name} {len(prompt)}")
            return 0.0

        return first_s

    with answering(noting("a")) as (a, at_a), answering(noting("b")) as (b, at_b):
        rows, left_out = take_turns(PLAN, [Contestant("a", a, "m3"), Contestant("b", b, "m3")])
    asked = [20, *(context for context in (20, 40) for _ in range(4))]
    assert order == [f"{name} {tokens}" for tokens in asked for name in "ab"]
    assert [body["prompt"] for body in at_a] == [body["prompt"] for body in at_b]
    assert [(row.engine, row.context) for row in rows] == [
        ("a", 20), ("b", 20), ("a", 40), ("b", 40)
    ]  # fmt: skip
    assert all(row.chunk_low_ms <= row.chunk_ms <= row.chunk_high_ms for row in rows)
    assert left_out == {}


def test_who_is_too_slow_is_stopped_and_gets_no_longer_prompt() -> None:
    stopped: list[str] = []
    plan = replace(PLAN, contexts=(20, 40, 80), limit_s=4.0)
    with (
        answering(lambda prompt: 6.0 if len(prompt) == 40 else 0.0) as (slow, at_slow),
        answering(lambda prompt: 0.0) as (fast, _),
    ):
        contestants = [
            Contestant("slow", slow, "m3", stop=lambda: stopped.append("slow")),
            Contestant("fast", fast, "m3", stop=lambda: stopped.append("fast")),
        ]
        rows, left_out = take_turns(plan, contestants)
    assert stopped == ["slow"]
    assert [row.context for row in rows if row.engine == "slow"] == [20]
    assert [row.context for row in rows if row.engine == "fast"] == [20, 40, 80]
    assert [len(body["prompt"]) for body in at_slow] == [20] * 5 + [40]
    assert list(left_out) == ["slow from 40 tokens"]
    assert "--prompt-minutes" in left_out["slow from 40 tokens"]


def test_a_prompt_that_cannot_be_read_in_time_is_not_begun() -> None:
    plan = replace(PLAN, contexts=(20, 4000), limit_s=4.0)
    with answering(lambda prompt: 0.1) as (url, bodies):
        rows, left_out = take_turns(plan, [Contestant("slow", url, "m3")])
    assert {len(body["prompt"]) for body in bodies} == {20}
    assert [row.context for row in rows] == [20]
    assert list(left_out) == ["slow from 4,000 tokens"]


def counted(requests: float, steps: float, **seconds: float) -> Decoding:
    return Decoding(
        requests=requests,
        token_seconds=0,
        drafts=0,
        steps=steps,
        **{"store": 0.0, "select": 0.0, "attend": 0.0, "dense": 0.0, **seconds},
    )


def test_parts_of_a_step_add_up_to_what_the_client_saw() -> None:
    parts = parts_of_a_step(
        counted(3, 100, store=0.1, select=0.2, attend=0.3, dense=1.0), token_ms=40
    )
    assert parts == {
        "store_ms": pytest.approx(1),
        "select_ms": pytest.approx(2),
        "attend_ms": pytest.approx(3),
        "dense_ms": pytest.approx(10),
        "rest_ms": pytest.approx(24),
    }
    assert parts_of_a_step(counted(3, 0), token_ms=40) == {}


def test_a_row_counts_its_own_rounds() -> None:
    seen: list[int] = []

    def decoding() -> Decoding:
        # 4 requests at each context behind one to warm up; the first of the 4 is not counted
        return counted(len(seen), 31 * len(seen), dense=0.031 * len(seen))

    with answering(lambda prompt: seen.append(1) or 0.0) as (url, _):
        rows, _ = take_turns(PLAN, [Contestant("ours", url, "m3", decoding=decoding)])
    assert [row.dense_ms for row in rows] == [pytest.approx(1), pytest.approx(1)]
    for row in rows:
        assert row.rest_ms == pytest.approx(row.token_ms - 1)


ROW = EngineRow(
    engine="m3-plugin on vLLM",
    context=131_072,
    prompt_ms=1_234_567,
    chunk=512,
    chunk_ms=12_345.6,
    chunk_low_ms=11_000,
    chunk_high_ms=13_000,
    token_ms=1234.5,
    token_low_ms=1200,
    token_high_ms=1300,
    rounds=3,
    dense_ms=800,
    select_ms=100,
    attend_ms=100,
    store_ms=34.5,
    rest_ms=200,
)
PEERS = [
    replace(
        ROW,
        engine=variant.name,
        **dict.fromkeys(("dense_ms", "select_ms", "attend_ms", "store_ms", "rest_ms")),
    )
    for variant in VARIANTS
]
FOUND = Engines(
    engines=[
        Engine(ROW.engine, "0.32.0", "", "msa"),
        Engine(PEERS[0].engine, "7000 (abc)", "-fa on -np 1", "msa"),
        Engine(PEERS[1].engine, "7000 (abc)", "", "dense"),
    ],
    rows=[ROW, *PEERS],
    left_out={"llama.cpp, defaults from 131,072 tokens": "reading one prompt takes too long"},
)


def test_tables_fit_the_screen() -> None:
    out = StringIO()
    print_engines(FOUND, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "41.5 (39.4 - 46.5)" in text  # 512 tokens in 12.3456 s, from 13 s to 11 s
    assert "1,234 (1,200 - 1,300)" in text
    assert "attends dense" in text
    assert "800 65%" in text
    assert "left out: reading one prompt" in text


def test_pictures_have_a_curve_for_each_engine_and_part(tmp_path: Path) -> None:
    panels = panels_of(FOUND)
    assert [len(panel.curves) for panel in panels] == [3, 3, 5]
    assert panels[0].curves[0].points == ((131_072, 1234.5, 1200, 1300),)
    shares = [curve.points[0][1] for curve in panels[2].curves]
    assert sum(shares) == pytest.approx(1)
    plot_panels(panels, tmp_path / "engines.png", title="", unit="ms")
    assert (tmp_path / "engines.png").read_bytes()[:4] == b"\x89PNG"


def executable(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def test_the_server_is_found_where_a_build_puts_it(tmp_path: Path) -> None:
    server = executable(tmp_path / "build" / "bin" / "llama-server", "echo 'version: 7 (ab)' >&2")
    for given in (tmp_path / "build", server.parent, server):
        assert find_server(given) == server
    assert version_of(server) == "7 (ab)"
    with pytest.raises(LookupError, match="holds none, nor does its bin/"):
        find_server(tmp_path)
    stranger = executable(tmp_path / "llama-server", "echo hello")
    with pytest.raises(LookupError, match="names no version"):
        version_of(stranger)
    stranger.write_text("\x7fELF of another machine")
    with pytest.raises(LookupError, match="is it built for this machine"):
        version_of(stranger)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "ollama", "--llama-cpp", "."], "unknown: ollama; known: llama.cpp"),
        (["--llama-cpp", "."], "is used with --peers llama.cpp only"),
        (
            ["--peers", "llama.cpp", "--llama-cpp", ".", "--step-contexts", "512,1024"],
            "each must exceed the 512 tokens of --prefill-rows",
        ),
        (["--peers", "llama.cpp", "--llama-cpp", ".", "--prompt-minutes", "0"], "0.1"),
    ],
)
def test_refused_options(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "cpu", *options])
    assert result.exit_code == 2
    assert message in in_one_line(result.output)
