"""What `m3-plugin demo` prints and keeps, without a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.demo import Answer, _log_of, _report
from m3_plugin.cli.hosts import HOSTS
from tests.console import in_one_line

ANSWER = Answer(
    label="short [chain]",
    asked="what [bold]next[/red]?",
    expected="a [/dim] b",
    received="nothing [/red] of [blink]it",
    prompt_tokens=1,
    cached_tokens=0,
    prefill_blocks=(1, 2),
    decode_blocks=(1, 2),
    first_token_s=0.1,
    decode_ms_per_token=None,
)


@pytest.mark.parametrize("host", HOSTS)
def test_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], host: str) -> None:
    answers = [ANSWER, replace(ANSWER, received=ANSWER.expected)]
    _report(answers, answers, host=HOSTS[host], right=False)
    shown = capsys.readouterr().out
    for word in ("[/red]", "[blink]it", "[/dim]", "[chain]", "[bold]next[/red]?"):
        assert word in shown


def test_each_server_has_its_own_log() -> None:
    log = Path("folder/server.log")
    assert _log_of(log, speculative=False) == log
    assert _log_of(log, speculative=True) == Path("folder/server.log.speculative")
    assert _log_of(None, speculative=True) is None


def test_a_log_without_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--log", str(tmp_path / "absent" / "server.log")])
    assert done.exit_code == 2
    assert "there is no folder" in in_one_line(done.output)
