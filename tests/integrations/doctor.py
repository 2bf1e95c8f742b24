"""`m3-plugin doctor` in an environment with a host, the same for each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m3_plugin.diagnosis import Finding, Report
from m3_plugin.diagnosis.hosts import HOSTS, examine_hosts
from tests.planted import plant, ran
from tests.plugin.cli.schemas import checked

ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration")


def check_served(host: str, checkpoint: Path, folder: Path) -> None:
    """The whole command, as typed by a user: the plugin serves, and exit code and JSON say so."""
    doctor = (sys.executable, "-P", "-m", "m3_plugin.cli", "doctor")
    command = [*doctor, "--json", "--framework", host]
    # stands in a copy of the checkpoint in which modules lie
    here = Path(shutil.copytree(checkpoint, folder / "checkpoint"))
    witness = folder / "witness"
    plant(here, witness=witness)
    done = subprocess.run(
        [*command, "--model", "."],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran(witness) == []
    found = checked("doctor", done.stdout)
    failures = [f for f in found["findings"] if f["status"] == "failure"]
    assert failures == []
    assert found["ok"] is True
    assert done.returncode == 0
    values = {f["name"]: f["value"] for f in found["findings"]}
    assert all(f"m3_{host}." in values[name] for name in ARCHITECTURES)
    assert values["page size"] == "128"
    assert "oracle" in values["self-test"]


def check_hidden(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allow-list made for another plugin is found, with the list that would do."""
    variable = HOSTS[host].allow_list
    monkeypatch.setenv(variable, "another")
    (found,) = failures(host)
    assert found.value == f"{variable}=another hides the plugin"
    assert found.advice == f"{variable}=another,m3"


def failures(host: str) -> list[Finding]:
    """What keeps the plugin out of this host, by the host's own loader in a child process."""
    report = Report()
    examine_hosts(report, host)
    assert all(finding.advice for finding in report.findings if finding.status == "failure")
    return [finding for finding in report.findings if finding.status == "failure"]


def break_triton(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Triton that cannot be imported before the real one, for child processes."""
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text("raise ImportError('libtriton is broken')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
