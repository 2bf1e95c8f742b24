"""Room in memory as `doctor` sees it, and what it tells to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.doctor import next_command
from m3_plugin.diagnosis import Report, memory
from m3_plugin.diagnosis.device import _when_wrong
from m3_plugin.diagnosis.hosts import HOSTS, _examine_facts
from m3_plugin.diagnosis.memory import Ranks, examine_memory, gpu_option, main_memory, ranks_of
from m3_plugin.diagnosis.model import examine_model
from m3_plugin.host.presence import TestedWindow
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config

MXFP8 = "MiniMaxAI/MiniMax-M3-MXFP8"
H100 = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "gib": 79.1}


def gpus(count: int) -> dict[str, Any]:
    return {"device_type": "cuda", "gpus": [H100] * count}


def examined(model: str, found: dict[str, Any]) -> tuple[Report, Ranks | None]:
    """Report of a model on devices that were seen, as `doctor` puts it together."""
    report = Report()
    for number, _ in enumerate(found["gpus"]):
        report.add("device", f"GPU {number}", "there", id=f"gpu.{number}")
    config = examine_model(report, model)
    assert config is not None
    return report, examine_memory(report, model, config, found)


@pytest.mark.parametrize(
    ("model", "count", "status", "said"),
    [
        (MXFP8, 8, "ok", "53.3 GiB of weights per GPU in 79.1 GiB on each of 8: room for"),
        (MXFP8, 4, "warning", "too little: 104.7 GiB of weights per GPU"),
        ("MiniMaxAI/MiniMax-M3", 8, "warning", "too little: 101.2 GiB"),
    ],
)
def test_on_gpus(model: str, count: int, status: str, said: str) -> None:
    report, _ = examined(model, gpus(count))
    (finding,) = [f for f in report.findings if f.id == "model.memory"]
    assert finding.status == status
    assert said in finding.value
    assert bool(finding.advice) == (status == "warning")


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    assert main_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal:  1073741824 kB\nMemFree: 1 kB\n")
    assert main_memory() == 2**40
    (tmp_path / "memory.max").write_text("max\n")
    assert main_memory() == 2**40
    found = {"device_type": "cpu", "gpus": []}
    report, ranks = examined(MXFP8, found)
    assert ranks is not None
    assert ranks.options == "--gpu CPU --gpu-memory 1024 --tp 1"
    # a container's limit is what counts
    (tmp_path / "memory.max").write_text(f"{2**35}\n")
    assert main_memory() == 2**35
    report, _ = examined(MXFP8, found)
    assert "too little" in report.findings[-1].value


@pytest.mark.parametrize(
    ("name", "gib", "options"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "--gpu H100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "--gpu A100-80GB"),
        ("NVIDIA H200", 139.8, "--gpu H200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 94.9, "--gpu RTX-PRO-6000"),
        # of that name, with more memory
        ("NVIDIA H100 NVL", 93.1, '--gpu "NVIDIA H100 NVL" --gpu-memory 93.1'),
        ("NVIDIA GH200 480GB", 94.5, '--gpu "NVIDIA GH200 480GB" --gpu-memory 94.5'),
    ],
)
def test_cards_are_named_as_fit_knows_them(name: str, gib: float, options: str) -> None:
    assert gpu_option(name, gib) == options
    command = ["fit", "--model", MXFP8, *shlex.split(options)]
    assert CliRunner().invoke(app, command).exit_code in (0, 1)


def test_ranks_are_those_that_heads_can_be_split_over() -> None:
    config = M3Config.from_hf(released_config())
    counts = {seen: ranks_of(config, gpus(seen)) for seen in (1, 3, 6, 8)}
    assert {seen: r and r.count for seen, r in counts.items()} == {1: 1, 3: 2, 6: 4, 8: 8}
    assert ranks_of(config, {"device_type": "cuda", "gpus": []}) is None


def test_what_is_not_downloaded_is_a_warning() -> None:
    examine_model(report := Report(), MXFP8)
    (finding,) = [f for f in report.findings if f.id == "model.found"]
    assert finding.status == "warning"
    assert f"hf download {MXFP8}" in finding.advice
    assert report.ok


def test_the_next_command() -> None:
    report, ranks = examined(MXFP8, gpus(8))
    fit = next_command(report, model=MXFP8, ranks=ranks)
    assert fit == f"m3-plugin fit --model {MXFP8} --gpu H100 --tp 8"
    assert CliRunner().invoke(app, shlex.split(fit)[1:]).exit_code == 0
    # it does not fit here: what would it take?
    report, ranks = examined("MiniMaxAI/MiniMax-M3", gpus(8))
    fit = next_command(report, model="MiniMaxAI/MiniMax-M3", ranks=ranks)
    assert fit == "m3-plugin fit --model MiniMaxAI/MiniMax-M3 --gpu H200 --tp 8"
    assert next_command(report, model=None, ranks=None) == f"m3-plugin doctor --model {MXFP8}"
    assert next_command(Report(), model=None, ranks=None) == "m3-plugin demo"
    report.add("vLLM", "installed", "no", status="failure", advice="install it")
    assert next_command(report, model=MXFP8, ranks=ranks) == f"m3-plugin doctor --model {MXFP8}"


def test_wrong_kernels_have_a_way_out_that_exists() -> None:
    gpu = _when_wrong("cuda")
    # there is no other family on a GPU
    assert "M3_PLUGIN_KERNELS" not in gpu
    for advice in (gpu, _when_wrong("cpu")):
        assert "M3_PLUGIN_DISABLE=1" in advice
        assert "m3-plugin check --json" in advice


@pytest.mark.parametrize(
    ("version", "status", "said"),
    [
        ("0.32.1", "ok", "0.32.1: tested"),
        ("0.33.0", "note", "0.33.0: accepted, not tested"),
        ("0.35.0", "failure", "outside the tested window"),
    ],
)
def test_a_release_is_tested_or_accepted(version: str, status: str, said: str) -> None:
    window = TestedWindow("vllm", "0.31", "0.34", tested=("0.31", "0.32"))
    facts = {
        "version": version,
        "window": [window.minimum, window.below],
        "tested": window.was_tested(version),
        "refusal": window.refusal(version),
        "architectures": {},
        "details": {},
        "stale_caches": [],
    }
    _examine_facts(report := Report(), HOSTS["vllm"], facts, "")
    (finding,) = report.findings
    assert (finding.id, finding.status) == ("vllm.version", status)
    assert said in finding.value
