"""Needles: where they are hidden, how a run is gone on with, and what stops it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.evaluate.haystack import ConstructedHaystack, TextHaystack
from m3_plugin.cli.evaluate.needle import Cell, Grid, Result, _plot, shares
from m3_plugin.testing.prompts import needle_prompt

runner = CliRunner()
SETTINGS = {"needles": "text", "model": None, "prose": "None"}


def result(context: int = 100, depth: float = 0.5, seed: int = 0, right: bool = True) -> Result:
    return Result(context, depth, seed, depth, context, "7", "7" if right else "", right, 0.1)


@pytest.mark.parametrize("context", [1500, 9000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.7, 1.0])
def test_a_constructed_needle_stands_at_its_depth(context: int, depth: float) -> None:
    for seed in range(5):
        question = ConstructedHaystack().question(context=context, depth=depth, seed=seed)
        # what else has to be in the text takes 700 tokens
        assert question.depth == pytest.approx(depth, abs=0.05 + 350 / context)
        assert question.is_right(f" {question.expected}")
        assert not question.is_right(f"{question.expected} nowhere")


def test_depth_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"depth must be within 0\.\.1"):
        needle_prompt(3, num_tokens=2000, depth=1.5)


def count(text: str) -> int:
    """A tokenizer that makes a token of three characters, and a template of 40."""
    return len(text) // 3 + 40


@pytest.mark.parametrize("context", [500, 5000, 50000])
def test_text_needles_have_the_length_the_server_counts(context: int) -> None:
    haystack = TextHaystack(count)
    for depth in (0.0, 0.25, 1.0):
        question = haystack.question(context=context, depth=depth, seed=1)
        assert count(question.text) == pytest.approx(context, abs=5 + context / 200)
        assert question.depth == pytest.approx(depth, abs=60 / context)
        assert question.expected in question.text
        assert question.is_right(f"The number is {question.expected}.")
        assert not question.is_right(str(int(question.expected) + 1))


def test_a_fact_stands_between_sentences() -> None:
    question = TextHaystack(count).question(context=3000, depth=0.5, seed=0)
    before, _, after = question.text.partition(" The secret number of the town")
    assert before.endswith(".")
    assert after.split(".", 1)[1].startswith(" ")


def test_own_prose_is_repeated_as_far_as_needed() -> None:
    question = TextHaystack(count, prose="Call me back. ").question(context=900, depth=1, seed=0)
    assert question.text.count("Call me back.") > 100


def test_a_server_that_counts_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"usage\.prompt_tokens"):
        TextHaystack(lambda text: 7)


def test_a_broken_run_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "needle.json"
    Grid(file, SETTINGS).add(result(depth=0.0))
    grid = Grid(file, SETTINGS)
    assert list(grid.results) == [Cell(100, 0.0, 0)]
    grid.add(result(depth=1.0))
    assert len(Grid(file, SETTINGS).results) == 2
    assert list(tmp_path.iterdir()) == [file]


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "needle.json"
    Grid(file, SETTINGS).add(result())
    with pytest.raises(ValueError, match="another --output"):
        Grid(file, SETTINGS | {"needles": "constructed"})
    file.write_text("{}")
    with pytest.raises(ValueError, match="holds no results"):
        Grid(file, SETTINGS)


def test_repeats_are_averaged_and_drawn(tmp_path: Path) -> None:
    results = [result(seed=0), result(seed=1, right=False), result(context=200)]
    assert shares(results) == {(0.5, 100): 0.5, (0.5, 200): 1.0}
    pytest.importorskip("matplotlib")
    _plot(results, tmp_path / "needle.png")
    assert (tmp_path / "needle.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--url", "http://127.0.0.1:9"), 3, "is the server running?"),
        (("--depths", "120"), 2, "must be within 0..100"),
        (("--contexts", "many"), 2, "not numbers"),
        (("--contexts", ""), 2, "at least one length"),
        (("--contexts", "100000"), 2, "Start your own"),
        (("--contexts", "100"), 2, "num_tokens must be at least"),
        (("--framework", "tgi"), 2, "is not one of 'vllm', 'sglang'"),
        (("--prose", "/nowhere/prose.txt"), 2, "does not exist"),
        (("--prose", sys.executable), 2, "must be UTF-8 text"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, options: tuple[str, ...], status: int, message: str
) -> None:
    done = runner.invoke(app, ["eval", "needle", "--output", str(tmp_path / "n.json"), *options])
    assert done.exit_code == status
    assert message in " ".join(done.output.replace("│", " ").split())


def test_a_wrong_answer_fails_the_command(tmp_path: Path) -> None:
    file = tmp_path / "needle.json"
    grid = Grid(file, SETTINGS)
    for depth in (0.0, 1.0):
        grid.add(result(context=2048, depth=depth, right=depth == 0))
    options = ("--url", "http://127.0.0.1:9", "--contexts", "2048", "--depths", "0,100")
    done = runner.invoke(app, ["eval", "needle", "--output", str(file), *options])
    assert done.exit_code == 1
    assert "expected '7'" in done.output
    assert len(json.loads(file.read_text())["results"]) == 2
