"""`m3-plugin bench serve`: what becomes of the client's numbers, and what it says without any."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.bench import serve
from m3_plugin.cli.bench.report import Panel
from m3_plugin.cli.bench.serve import (
    ClientFailed,
    Load,
    Row,
    Server,
    ServeReport,
    growing_share,
    run_client,
    write_csv,
)
from m3_plugin.cli.hosts import HOSTS

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


def test_growing_share() -> None:
    rows = [row("a", 4096, 20.0), row("a", 1024, 10.0), row("b", 1024, 5.0), row("a", 8192, 40.0)]
    assert growing_share(rows, "a") == [(1024, 0.0), (4096, 0.5), (8192, 0.75)]


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


def test_the_reason_of_a_server_is_its_last_error() -> None:
    log = "server ended with 1; end of log:\nValueError: first\nTypeError: cannot\nnoise"
    assert serve._reason(log) == "TypeError: cannot"
    assert serve._reason("server did not answer") == "server did not answer"
    pointing = (
        "(EngineCore pid=7) ERROR [core.py:1] NotImplementedError: not on CPU.\n"
        "(APIServer pid=1) RuntimeError: initialization failed. See root cause above. Failed: {}\n"
    )
    assert serve._reason(pointing) == "NotImplementedError: not on CPU."


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(name, at, at / 100) for name in ("m3-plugin", "dense") for at in (1024, 4096)]
    serve._plot(ServeReport({"cpu": "a cpu"}, "vLLM", "m3", rows), tmp_path / "serve.png")
    assert (tmp_path / "serve.png").stat().st_size > 1000


def test_what_grows_is_drawn_as_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Panel] = []
    monkeypatch.setattr(serve, "plot_panels", lambda panels, *args, **options: drawn.extend(panels))
    rows = [row("m3-plugin", 4096, 20.0), row("m3-plugin", 1024, 10.0)]
    serve._plot(ServeReport({"cpu": "a cpu"}, "vLLM", "m3", rows), tmp_path / "serve.png")
    (share,) = [panel for panel in drawn if panel.share]
    (curve,) = share.curves
    assert [(at, value) for at, value, _, _ in curve.points] == growing_share(rows, "m3-plugin")
    (times, _) = [panel for panel in drawn if not panel.share]
    assert [point[:2] for point in times.curves[0].points] == [(1024, 10.0), (4096, 20.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "http://127.0.0.1:9"), "--model and --tokenizer"),
        (("--contexts", ""), "at least one context"),
        (("--contexts", "100000"), "Start your own"),
        (("--host", "tgi"), "--host must be one of"),
    ],
)
def test_mistakes_are_named(options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
