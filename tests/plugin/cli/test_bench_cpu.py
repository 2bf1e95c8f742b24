"""`m3-plugin bench cpu` on contexts of a few pages: what it reports, and when it refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from m3_kernels import kernel_families
from m3_kernels.testing.timing import Timing, time_interleaved
from m3_plugin.cli import app
from m3_plugin.cli.bench import cpu
from tests.plugin.cli.schemas import checked

SMALL = [
    "bench",
    "cpu",
    "--contexts",
    "600,1024",
    "--prefill-contexts",
    "640",
    "--prefill-rows",
    "8",
]
runner = CliRunner()


def test_report(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = runner.invoke(app, [*SMALL, "--rounds", "2", "--output", str(file)])
    assert result.exit_code == 0, result.output
    report = checked("bench-cpu", file.read_text())
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert {"cpu", "commit", "torch", "kernels", "load_average_before"} <= set(report["machine"])
    rows = {(row["phase"], row["name"], row["context"]): row for row in report["rows"]}
    for phase, context in (("decode", 600), ("decode", 1024), ("prefill", 640)):
        assert (phase, "native", context) in rows
        assert (phase, "dense sdpa", context) in rows
    assert all(row["median_ms"] > 0 for row in rows.values())
    dense, ours = rows["decode", "dense sdpa", 1024], rows["decode", "native", 1024]
    assert dense["bytes_read"] == 1024 * 2 * 4 * 128 * 2
    assert ours["bytes_read"] == 1024 * 128 * 2 + dense["bytes_read"]
    assert rows["prefill", "native", 640]["rows"] == 8


def test_json_on_stdout_is_alone_there() -> None:
    arguments = ["bench", "cpu", "--contexts", "256", "--prefill-contexts", "", "--rounds", "1"]
    result = runner.invoke(app, [*arguments, "--json"])
    assert {row["context"] for row in checked("bench-cpu", result.stdout)["rows"]} == {256}
    assert "decode of one sparse layer" not in result.output


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    result = runner.invoke(app, [*SMALL, "--rounds", "1", "--plot", str(file)])
    assert result.exit_code == 0, result.output
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(kernel_families("cpu")[0].refusal is not None, reason="no C++ kernels here")
def test_no_numbers_when_the_methods_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: cpu._Layer) -> Tensor:
        return torch.zeros_like(layer.q)

    monkeypatch.setattr(cpu._Layer, "dense_bmm", wrong)
    result = runner.invoke(app, [*SMALL, "--rounds", "1"])
    assert result.exit_code == 1
    assert "C++ and dense bmm differ" in result.output
    assert "median" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "8k"], "not numbers"),
        (["--contexts", "0"], "must be positive"),
        (["--prefill-contexts", "256", "--prefill-rows", "512"], "shorter than the chunk"),
    ],
)
def test_refused_options(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["bench", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_functions_are_timed_in_turn() -> None:
    order = []
    timings = time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1
    )
    assert order == ["a", "b"] * 4
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_timing_is_a_median_and_quartiles() -> None:
    timing = Timing((5.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.median == 3
    assert timing.quartiles == (2, 5)
    assert timing.minimum == 1
    assert Timing((2.0,)).quartiles == (2, 2)


@pytest.mark.parametrize("name", ["cpu-attention", "cpu-attention-avx2"])
def test_published_results_are_what_the_command_writes(name: str) -> None:
    file = Path(__file__).parents[3] / "docs" / "results" / f"{name}.json"
    found = checked("bench-cpu", file.read_text())
    assert found["machine"]["commit"]
