"""`m3-plugin bench kernels --model`: figures of the kernels on record, and what becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from m3_kernels.testing.compile_gate import Compiled, read_known
from m3_kernels.testing.time_model import CHIPS
from m3_plugin.cli import app
from m3_plugin.cli.bench import model
from m3_plugin.cli.bench.kernels import ModelChip
from m3_plugin.cli.bench.report import short
from m3_plugin.cli.bench.roofline import Geometry, Workload
from tests.plugin.cli.schemas import checked

RECORD = Path(__file__).parents[3] / "docs" / "results" / "kernels-compiled.json"


def on_record(wanted: set[tuple[str, str]], arch: int, record: Path | None) -> Any:
    """What `figures_of` finds, without asking Triton whether the kernels are still these."""
    known = read_known(RECORD).figures
    return {
        (kernel["op"], kernel["variant"]): known[kernel["fingerprint"]]
        for kernel in json.loads(RECORD.read_text())["kernels"]
        if kernel["arch"] == arch and (kernel["op"], kernel["variant"]) in wanted
    }


def rows(chip: str, *options: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["bench", "kernels", "--model", chip, "--json", *options])
    assert result.exit_code == 0, result.output
    return checked("bench-kernels-model", result.output)["rows"]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "figures_of", on_record)


def test_every_chip_of_the_command_is_modelled() -> None:
    assert {chip.value for chip in ModelChip} == set(CHIPS)


def test_default_workloads() -> None:
    """No time is below the least that memory and tensor cores allow; H200 differs by its memory."""
    h100, h200 = rows("H100"), rows("H200")
    assert {row["phase"] for row in h100} == {"decode", "verify", "prefill"}
    assert {row["index"] for row in h100} == {"bf16", "int8", "e4m3"}
    for slow, fast in zip(h100, h200, strict=True):
        assert slow["total_us"] == pytest.approx(sum(slow["parts"].values()))
        assert fast["floor_us"] <= slow["floor_us"] < slow["total_us"]
        assert fast["total_us"] <= slow["total_us"]


def test_a_narrow_terminal_breaks_names_and_no_number() -> None:
    shown = (
        CliRunner()
        .invoke(app, ["bench", "kernels", "--model", "H200"], env={"COLUMNS": "80"})
        .output
    )
    assert "…" not in shown
    for row in rows("H200"):
        assert f" {short(row['total_us'])} " in shown


def test_one_request_of_a_million_tokens_is_read_once() -> None:
    """By hand: 2 ** 20 keys of 256 bytes at 4.3 TB/s are 62.4 us, beside the way to them."""
    (row, *_) = rows("H200", "--decode", "1x1048576", "--verify", "", "--prefill", "")
    assert 62.4 < row["parts"]["scores"] < 72


def test_each_launch_of_a_layer_is_there() -> None:
    """Names of production variants, so that none is modelled by a kernel that nobody launches."""
    steps = [
        Workload("decode", 1, 1024),
        Workload("verify", 2, 2**20, rows=8),
        Workload("prefill", 1, 2**17, rows=8192),
    ]
    for step in steps:
        for index in model.INDEX_BYTES:
            parts = model.parts_of(step, index, Geometry(), CHIPS["H100"])
            assert [part.name for part in parts] == ["store", "scores", "choice", "attention"]
            wanted = {(part.op, part.variant) for part in parts}
            assert set(on_record(wanted, 90, None)) == wanted


def test_table_and_file(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    line = ["bench", "kernels", "--model", "H100", "--output", str(file)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "a model, not a measurement" in result.output
    assert "off by up to 25%" in result.output
    assert len(checked("bench-kernels-model", file.read_text())["rows"]) == 3 * 18


def test_the_kernels_themselves_are_asked(tmp_path: Path) -> None:
    """In a process that compiles: figures stand on record by what a kernel is, not by its name."""
    program = f"""
import sys
from pathlib import Path
from m3_kernels.testing import compile_gate
from m3_plugin.cli.bench.model import figures_of
compile_gate.compile_variant = lambda variant, arch: sys.exit("compiled")
wanted = {{("norm_rope_store", "KV bf16 index bf16")}}
print(len(figures_of(wanted, 90, Path({str(RECORD)!r}))))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


def test_figures_are_those_of_the_record() -> None:
    found = on_record({("index_topk", "decode scores bf16 q_len 1")}, 90, None)
    (figures,) = found.values()
    assert isinstance(figures, Compiled)
    assert figures.timeline.loops[figures.timeline.hot].products == 16
