"""What the commands say about themselves: the list, `--help`, and examples that can be typed."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.help import NOTES
from m3_plugin.cli.outputs import SCHEMAS
from m3_plugin.settings import PREFIX, Settings

runner = CliRunner()


def commands(command: Any = None, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command by its words."""
    command = command or get_command(app)
    if not hasattr(command, "commands"):
        return {" ".join(words): command}
    found: dict[str, Any] = {}
    for name, inner in command.commands.items():
        found |= commands(inner, (*words, name))
    return found


def help_of(words: str, option: str = "--help") -> str:
    result = runner.invoke(app, [*words.split(), option], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


def test_every_command_has_notes_and_a_schema() -> None:
    assert set(commands()) == set(NOTES)
    # `bench kernels --model` prints what was modelled, which has another form
    expected = {words.replace(" ", "-") for words in NOTES} | {"bench-kernels-model"}
    assert {f.stem for f in SCHEMAS.iterdir()} == expected


@pytest.mark.parametrize("words", ["", *NOTES])
def test_help_is_for_people(words: str) -> None:
    told = help_of(words)
    assert help_of(words, "-h") == told
    assert "<bool>" not in told
    assert "Show this message and exit" in told
    if words:
        assert told.count("\nExamples:\n") == told.count("\nExit codes:\n") == 1
        assert len(NOTES[words].examples) == 2


def test_without_arguments_the_commands_stand_in_the_order_of_the_first_hour() -> None:
    told = runner.invoke(app, [], env={"COLUMNS": "80"}).output
    listed = re.findall(r"^│ ([a-z-]+) +\S", told.partition("Commands")[2], re.MULTILINE)
    order = ["doctor", "fit", "check", "eval", "soak", "bench", "demo", "blocks", "tiny"]
    assert listed == [*order, "uninstall-leftovers"]
    # one line each: nothing is broken into a second one
    for words in NOTES:
        if " " not in words:
            assert NOTES[words].summary in told
    assert "First hour: doctor, fit, the command that fit prints, check, eval needle." in told


@pytest.mark.parametrize("line", [line for notes in NOTES.values() for line in notes.examples])
def test_examples_can_be_typed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.partition(" > ")[0])
    assert words.pop(0) == "m3-plugin"
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    # parses and validates, and runs nothing
    command.make_context(command.name, words)


def test_variables_in_help_exist() -> None:
    known = {PREFIX + field.name.upper() for field in fields(Settings)} | {"M3_PLUGIN_*"}
    for notes in NOTES.values():
        for names in notes.variables:
            assert {name for name in names.split(", ") if name.startswith(PREFIX)} <= known
