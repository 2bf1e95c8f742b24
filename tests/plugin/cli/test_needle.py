"""Needles: where they are hidden, how a run is gone on with, and what stops it."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.evaluate.haystack import ConstructedHaystack, TextHaystack
from m3_plugin.cli.evaluate.needle import Cell, Grid, Result, _plot, _print, shares
from m3_plugin.testing.prompts import needle_prompt
from tests.console import in_one_line
from tests.plugin.cli.schemas import checked

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
        prompt = needle_prompt(seed, num_tokens=context, hops=1, depth=depth)
        assert f" {question.dense}" == prompt.dense_answer
        assert not question.is_right(f" {question.dense}")


def test_answers_of_dense_attention_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = result(right=False)
    _print(
        [result(), wrong, replace(wrong, seed=1, dense=True), replace(wrong, seed=2, dense=True)]
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "2 of 4 answers are those of dense attention" in told
    _print([result(), wrong])
    assert "dense" not in capsys.readouterr().out


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
    assert message in in_one_line(done.output)


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


@pytest.fixture
def guarded() -> Iterator[str]:
    """An OpenAI server that wants a key and knows one answer: the number in the prompt."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"object": "list", "data": [{"id": "m3", "object": "model"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = asked["messages"][0]["content"]
            number = re.search(r" is (\d{7})\.", text)
            message = {"role": "assistant", "content": number[1] if number else "none"}
            usage = {"prompt_tokens": len(text) // 3, "completion_tokens": 1, "total_tokens": 9}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply({"id": "1", "object": "chat.completion", "created": 1, "model": "m3",
                        "choices": [choice], "usage": usage})  # fmt: skip

        def reply(self, body: dict) -> None:
            allowed = self.headers["Authorization"] == "Bearer secret"
            text = json.dumps(body if allowed else {"error": "Unauthorized"}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_with_a_key(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ask = ["eval", "needle", "--url", guarded, "--contexts", "900", "--depths", "50", "--json"]
    refused = runner.invoke(app, ask)
    assert refused.exit_code == 3
    assert "give its key with --api-key or OPENAI_API_KEY" in in_one_line(refused.stderr)
    by_option = runner.invoke(app, [*ask, "--api-key", "secret"])
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    by_variable = runner.invoke(app, ask)
    for result in (by_option, by_variable):
        assert result.exit_code == 0, result.output
        found = checked("eval-needle", result.stdout)
        assert [entry["right"] for entry in found["results"]] == [True]
        assert "secret" not in result.output
