"""`m3-plugin bench serve`: what becomes of the client's numbers, and what it says without any."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.bench import serve
from m3_plugin.cli.bench.report import Panel
from m3_plugin.cli.bench.serve import (
    ClientFailed,
    Decoding,
    Load,
    Row,
    Server,
    ServeReport,
    read_decoding,
    run_client,
    with_attention,
    write_csv,
)
from m3_plugin.cli.hosts import HOSTS
from m3_plugin.cli.outputs import envelope
from tests.console import in_one_line
from tests.plugin.cli.schemas import checked
from tests.processes import is_alive, wait_until

SERVER = Server("m3-plugin", "http://127.0.0.1:9", "m3", "/nowhere")
LOAD = Load(context=100, output_tokens=4, requests=2, concurrency=1)
FOUND = {
    "completed": 2,
    "median_ttft_ms": 50.0,
    "median_tpot_ms": 10.0,
    "p99_tpot_ms": 12.0,
    "output_throughput": 80.0,
}


def row(server: str, context: int, tpot_ms: float) -> Row:
    return Row(server, context, 16, 4, 1, 100.0, tpot_ms, tpot_ms, 10.0)


def answer_with(monkeypatch: pytest.MonkeyPatch, found: dict) -> None:
    """A client that writes `found` where the real ones write their results."""
    script = (
        "import sys, pathlib; o = sys.argv; "
        "f = o[o.index('--output-file') + 1] if '--output-file' in o else "
        "o[o.index('--result-dir') + 1] + '/' + o[o.index('--result-filename') + 1]; "
        f"pathlib.Path(f).write_text({json.dumps(found)!r})"
    )
    monkeypatch.setattr(serve, "_VLLM_CLIENT", script)


def exposed(*, requests: int, seconds: float, steps: int, select: float, drafts: int = 0) -> str:
    """A server's /metrics with two workers, and a prefill that must not be counted."""
    name = "vllm:request_time_per_output_token_seconds"
    lines = [
        f'{name}_sum{{model="m3"}} {seconds}',
        f'{name}_count{{model="m3"}} {requests}',
        f'vllm:spec_decode_num_drafts_total{{model="m3"}} {drafts}',
    ]
    for pid in (1, 2):
        labels = f'phase="decode",pid="{pid}"'
        lines += [
            f"m3_plugin:msa_steps_total{{{labels}}} {steps}",
            f'm3_plugin:msa_seconds_total{{part="store",{labels}}} {select / 4}',
            f'm3_plugin:msa_seconds_total{{part="select",{labels}}} {select}',
            f'm3_plugin:msa_seconds_total{{part="attend",{labels}}} {select / 2}',
            f'm3_plugin:msa_seconds_total{{part="select",phase="prefill"}} {9.0 * steps}',
            f'm3_plugin:msa_steps_total{{phase="prefill"}} {7.0 * steps}',
        ]
    return "\n".join(lines)


def scraped(monkeypatch: pytest.MonkeyPatch, text: str) -> Decoding:
    monkeypatch.setattr(serve, "exposition", lambda url: text)
    return read_decoding("http://nowhere", host=HOSTS["vllm"])


def test_share_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks: 2 requests of 20 ms per token; 10 steps of 2 + 8 + 4 ms on each rank."""
    before = scraped(monkeypatch, exposed(requests=3, seconds=0.5, steps=7, select=0.3))
    after = scraped(monkeypatch, exposed(requests=5, seconds=0.54, steps=17, select=0.38))
    found = with_attention(row("m3-plugin", 1024, 21.0), before, after)
    assert found.step_ms == pytest.approx(20)
    assert (found.store_ms, found.select_ms, found.attend_ms) == pytest.approx((2, 8, 4))
    assert found.msa_share == pytest.approx(0.7)
    assert found.tpot_ms == 21.0


@pytest.mark.parametrize(
    "after",
    [
        exposed(requests=5, seconds=0.54, steps=7, select=0.3),  # no times of layers
        exposed(requests=3, seconds=0.5, steps=17, select=0.38),  # no finished request
        exposed(requests=5, seconds=0.54, steps=17, select=0.38, drafts=4),
        "",
    ],
    ids=["untimed", "unfinished", "drafting", "no metrics"],
)
def test_no_share_where_the_server_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    before = exposed(requests=3, seconds=0.5, steps=7, select=0.3) if after else ""
    looks = scraped(monkeypatch, before), scraped(monkeypatch, after)
    plain = row("m3-plugin", 1024, 21.0)
    assert with_attention(plain, *looks) == plain
    (reason,) = serve._unknown_shares([plain]).values()
    assert "M3_PLUGIN_TIMINGS=1" in reason
    (reason,) = serve._unknown_shares([row("dense", 1024, 21.0)]).values()
    assert "the host's own" in reason


def test_the_warm_up_is_asked_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Load] = []

    def client(server: Server, load: Load, *, host: object) -> Row:
        asked.append(load)
        return row(server.name, load.context, 10.0 * len(asked))

    # the n-th look finds one request more, of n * 20 ms, and two steps of 1 + 4 + 2 ms
    looks = iter(range(1, 100))

    def expose(url: str) -> str:
        n = next(looks)
        seconds = 0.02 * n * (n + 1) / 2
        return exposed(requests=n, seconds=seconds, steps=2 * n, select=n * 0.008)

    monkeypatch.setattr(serve, "run_client", client)
    monkeypatch.setattr(serve, "exposition", expose)
    loads = [replace(LOAD, context=at, requests=1) for at in (100, 300, 200)]
    rows = serve.measure(SERVER, loads, host=HOSTS["vllm"])
    assert [load.context for load in asked] == [300, 100, 300, 200]
    assert [(row.context, row.tpot_ms) for row in rows] == [(100, 20.0), (300, 30.0), (200, 40.0)]
    assert [row.msa_share for row in rows] == pytest.approx([7 / 60, 7 / 80, 7 / 100])


@pytest.mark.parametrize("client", [serve._vllm_client, serve._sglang_client])
def test_no_prompt_is_asked_twice(client: Callable[..., list[str]], tmp_path: Path) -> None:
    """Neither by a warm-up of the client nor by the next run: a prefix cache would answer."""
    command = client(SERVER, LOAD, tmp_path / "result.json")
    options = {word: command[at + 1] for at, word in enumerate(command[:-1])}
    warm_up = {"--num-warmups", "--warmup-requests"} & options.keys()
    assert [options[name] for name in warm_up] == ["0"]
    again = client(SERVER, LOAD, tmp_path / "result.json")
    assert again[again.index("--seed") + 1] != options["--seed"]


def test_rows_of_the_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer_with(monkeypatch, FOUND)
    found = run_client(SERVER, LOAD, host=HOSTS["vllm"])
    assert (found.ttft_ms, found.tpot_ms, found.p99_tpot_ms) == (50.0, 10.0, 12.0)
    write_csv([found], tmp_path / "rows.csv")
    (line,) = csv.DictReader((tmp_path / "rows.csv").open())
    assert (line["context"], line["tpot_ms"]) == ("100", "10.0")


def test_failed_requests_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, FOUND | {"completed": 1})
    with pytest.raises(ClientFailed, match="1 of 2 requests of 100 tokens failed"):
        run_client(SERVER, LOAD, host=HOSTS["vllm"])


def test_a_client_that_dies_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_VLLM_CLIENT", "raise SystemExit('no such server')")
    with pytest.raises(ClientFailed, match="no such server"):
        run_client(SERVER, LOAD, host=HOSTS["vllm"])


def test_a_package_the_client_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_VLLM_CLIENT", "import no_such_package")
    with pytest.raises(ClientFailed, match="pip install no_such_package"):
        run_client(SERVER, LOAD, host=HOSTS["vllm"])


CLIENT = """
import os, pathlib, time
pathlib.Path({file!r}).write_text(str(os.getpid()))
time.sleep(300)
"""
STARTER = """
import signal
from m3_plugin.cli.bench import serve
from tests.plugin.cli.test_bench_serve import HOSTS, LOAD, SERVER
signal.signal(signal.SIGINT, signal.default_int_handler)
serve._VLLM_CLIENT = {client!r}
serve.run_client(SERVER, LOAD, host=HOSTS["vllm"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_client(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "pid"
    script = STARTER.format(client=CLIENT.format(file=str(file)))
    root = Path(__file__).parents[3]
    starter = subprocess.Popen([sys.executable, "-c", script], cwd=root)
    assert wait_until(lambda: file.exists() and bool(file.read_text()))
    starter.send_signal(number)
    assert starter.wait(60) != 0
    assert wait_until(lambda: not is_alive(int(file.read_text())))


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(name, at, at / 100) for name in ("m3-plugin", "dense") for at in (1024, 4096)]
    serve._plot(
        ServeReport({"cpu": "a cpu", "commit": "c"}, "vLLM", "m3", rows), tmp_path / "serve.png"
    )
    assert (tmp_path / "serve.png").stat().st_size > 1000


def test_what_is_known_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[list[Panel]] = []
    monkeypatch.setattr(serve, "plot_panels", lambda panels, *args, **options: drawn.append(panels))
    timed = {"step_ms": 10.0, "select_ms": 1.0, "msa_share": 0.3}
    ours = [replace(row("m3-plugin", at, at / 100), **timed) for at in (4096, 1024)]
    dense = [row("dense", at, at / 50) for at in (1024, 4096)]
    for rows in (ours + dense, dense):
        serve._plot(
            ServeReport({"cpu": "a cpu", "commit": "c"}, "vLLM", "m3", rows), tmp_path / "serve.png"
        )
    (tpot, _, share), silent = drawn
    assert [point[:2] for point in tpot.curves[0].points] == [(1024, 10.24), (4096, 40.96)]
    assert [curve.label for curve in tpot.curves] == ["m3-plugin", "dense"]
    assert [[point[1] for point in curve.points] for curve in share.curves] == [
        [0.3] * 2,
        [0.1] * 2,
    ]
    assert not any(panel.share for panel in silent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "http://127.0.0.1:9"), "--model and --tokenizer"),
        (
            ("--url", "http://127.0.0.1:9", "--model", "minimax/m3", "--tokenizer", "minimax/m3"),
            "did you mean MiniMaxAI/MiniMax-M3?",
        ),
        (("--contexts", ""), "at least one context"),
        (("--contexts", "100000"), "Start your own"),
        (("--framework", "tgi"), "is not one of 'vllm', 'sglang'"),
    ],
)
def test_mistakes_are_named(options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", *options])
    assert done.exit_code == 2
    assert message in in_one_line(done.output)


def test_the_client_is_given_the_key_by_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no list of processes shows it; both hosts' clients read it there."""
    seen = json.dumps(FOUND | {"median_ttft_ms": 1.0})
    script = (
        "import os, sys, pathlib; o = sys.argv; assert 'secret' not in ' '.join(o); "
        "assert os.environ['OPENAI_API_KEY'] == 'secret'; "
        "f = o[o.index('--result-dir') + 1] + '/' + o[o.index('--result-filename') + 1]; "
        f"pathlib.Path(f).write_text({seen!r})"
    )
    monkeypatch.setattr(serve, "_VLLM_CLIENT", script)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = replace(SERVER, api_key="secret")
    assert run_client(server, LOAD, host=HOSTS["vllm"]).ttft_ms == 1.0
    assert "secret" not in repr(server)
    with pytest.raises(ClientFailed, match="OPENAI_API_KEY"):
        run_client(SERVER, LOAD, host=HOSTS["vllm"])


def test_its_json_is_as_documented() -> None:
    report = ServeReport({"cpu": "a cpu"}, "vLLM", "m3", [row("m3-plugin", 1024, 10.0)])
    checked("bench-serve", json.dumps(envelope("bench-serve", asdict(report))))
