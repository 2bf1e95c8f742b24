"""`m3-plugin soak` against servers that behave and servers that do not; no model is needed."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from m3_plugin.cli import app
from m3_plugin.cli.soak import counters
from m3_plugin.soak.mixture import Mixture
from m3_plugin.soak.needles import ConstructedNeedles
from tests.console import in_one_line
from tests.plugin.cli.schemas import checked
from tests.plugin.soak.server import METRICS, Behaviour, Handler, serving

# the command has the name of its module
MODULE = sys.modules["m3_plugin.cli.soak"]
SEED = 1267
SHORT = ("--longest", "2048", "--concurrency", "4", "--constructed", "--seed", str(SEED))


@pytest.fixture(autouse=True)
def _short_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    # as long as the first requests of each client, of which none is slow
    monkeypatch.setattr(MODULE, "_MINUTE_S", 0.05)


@cache
def right_answers() -> dict[int, tuple[str, str]]:
    """Number of a request -> what it asks and what is right."""
    needles = ConstructedNeedles()
    mixture = Mixture(SEED, 2048, frozenset({"reset"}))
    prompts = {r.number: needles.prompt(r) for r in mixture.first(200) if not r.must_be_refused}
    return {n: (json.dumps(prompt.content), prompt.expected) for n, prompt in prompts.items()}


class Knows:
    """Answers as the constructed checkpoint would, by the question's text.

    Attributes
    ----------
    wrong : numbers of requests that are answered with another word
    """

    def __init__(self, *wrong: int) -> None:
        self.answers: dict[str, str] = {}
        for number, (asked, said) in right_answers().items():
            self.answers.setdefault(asked, "cedar" if number in wrong else said)

    def __call__(self, handler: Handler, body: dict[str, Any]) -> None:
        messages = body.get("messages")
        asked = json.dumps(messages[0].get("content")) if isinstance(messages, list) else ""
        if body.get("ignore_eos"):
            handler.answer(body, f"{self.answers[asked]} the")
        elif asked in self.answers:
            handler.answer(body, self.answers[asked])
        elif asked == '"x"' and body.get("max_tokens") == 1:
            handler.answer(body, "probe")
        else:
            # names everything that a refusal may have to name
            words = "messages, role, temperature, top_p, image, length: not like this"
            handler.say(400, {"error": {"message": words}})


def soak(*options: str, behaviour: Behaviour, used: float = 0.0) -> Result:
    with serving(behaviour) as server:
        server.used = used
        return CliRunner().invoke(app, ["soak", "--url", server.url, *SHORT, *options])


def test_a_good_server(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    knows = Knows()
    result = soak("--minutes", "2", "--output", str(output), behaviour=knows)
    assert result.exit_code == 0, result.output
    assert "nothing wrong, nothing lost" in result.output
    found = checked("soak", output.read_text())
    assert found["right"] is True
    assert len(found["minutes"]) == 2
    assert sum(minute["requests"] for minute in found["minutes"]) == found["next_number"]

    # the same command goes on where it was, and asks nothing twice
    again = soak("--minutes", "3", "--output", str(output), "--json", behaviour=knows)
    assert again.exit_code == 0, again.output
    longer = checked("soak", again.stdout)
    assert longer == checked("soak", output.read_text())
    assert longer["minutes"][:2] == found["minutes"]
    assert longer["next_number"] > found["next_number"]
    assert [minute["server"] for minute in longer["minutes"]] == [0, 0, 1]

    # and needs no server once it has all
    done = ["soak", "--url", "http://127.0.0.1:9", *SHORT, "--minutes", "3", "-o", str(output)]
    assert CliRunner().invoke(app, done).exit_code == 0
    other = CliRunner().invoke(app, [*done, "--max-slope", "2"])
    assert other.exit_code == 2
    assert "max_slope 1.0, this run has 2.0" in in_one_line(other.output)


def test_minutes_between_quiet_moments() -> None:
    more = ("--minutes", "5", "--idle-every", "3", "--json")
    result = soak(*more, behaviour=Knows())
    assert result.exit_code == 0, result.output
    found = checked("soak", result.stdout)
    assert [minute["idle"] for minute in found["minutes"]] == [False, False, True, False, True]
    # what requests hold while they run is nobody's fault
    assert [minute["used_when_idle"] for minute in found["minutes"]] == [
        None,
        None,
        0.0,
        None,
        0.0,
    ]
    assert sum(minute["requests"] for minute in found["minutes"]) == found["next_number"]


def test_a_wrong_answer_is_written_down_and_replayed(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    wrong = 0
    result = soak("--output", str(output), "--minutes", "1", behaviour=Knows(wrong))
    assert result.exit_code == 1
    assert Mixture(SEED, 2048).request(wrong).kind == "chain"
    assert f"request {wrong} (chain) is wrong" in result.output
    found = checked("soak", output.read_text())
    (fault,) = found["faults"]
    assert fault["number"] == wrong

    still = soak("--replay", str(output), "--json", behaviour=Knows(wrong))
    assert still.exit_code == 1
    again = checked("soak", still.stdout)
    # alone, and beside what was under way
    assert [entry["number"] for entry in again["faults"]] == [wrong, wrong]
    mended = soak("--replay", str(output), behaviour=Knows())
    assert mended.exit_code == 0, mended.output
    # the file of the run stays what it was
    assert checked("soak", output.read_text()) == found


def test_pages_that_are_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_SETTLING_S", 0.1)
    result = soak("--minutes", "1", behaviour=Knows(), used=0.125)
    assert result.exit_code == 1
    assert "12.50% of the cache is held while nobody asks" in result.output


def test_prompts_longer_than_the_server_takes() -> None:
    result = soak("--longest", "8000", behaviour=Knows())
    assert result.exit_code == 3
    assert "takes 8192 tokens; give a --longest of at most 7168" in in_one_line(result.output)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    for option in ("--output", "--replay"):
        result = soak(option, str(other), behaviour=Knows())
        assert result.exit_code == 2, result.output
        assert "holds no results of this command" in in_one_line(result.output)


def test_counters_of_both_hosts() -> None:
    found = counters(METRICS + "vllm:kv_cache_usage_perc 0.5\n", "")
    assert (found.preemptions, found.hit_tokens, found.used) == (3, 7, 0.5)
    sglang = 'sglang:num_retracted_requests_total{engine_type="unified"} 2.0\n'
    found = counters(sglang + "sglang:cached_tokens_total 9.0\n", "http://127.0.0.1:9")
    assert (found.preemptions, found.hit_tokens, found.used) == (2, 9, None)
    assert counters("", "").used is None
