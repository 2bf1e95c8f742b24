"""What the documents say is what the commands do."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.settings import PREFIX, Settings
from tests.deployment import plugin_metrics, sample_name
from tests.integrations.parser_corpus import CASES, MODES, STREAMED, Mode

DOCS = Path(__file__).parents[2] / "docs"
LM_EVAL = DOCS.parent / ".venv" / "lm-eval"
GUIDES = (
    *("install", "deploy", "operations", "commands", "evaluation", "benchmarks", "sizing"),
    *("troubleshooting", "parsers", "glossary"),
)
TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
PARSERS = (("vllm", "0.32.0"), ("sglang", "0.5.23"), ("sglang", "0.5.22"))
GIB = 2**30


def table_rows(name: str, first: str) -> list[list[str]]:
    """Cells of the rows whose first cell begins with `first`."""
    lines = [line for line in (DOCS / f"{name}.md").read_text().splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if row[0].strip().startswith(first)]


@pytest.mark.parametrize("ranks", ["4 x", "8 x"])
def test_the_sizing_table_is_what_fit_says(ranks: str) -> None:
    rows = [row for row in table_rows("sizing", ranks) if len(row) == 7]
    assert len(rows) >= 3
    for cards, model, weights, cache, tokens, fp8, with_int8 in rows:
        tp, _, gpu = cards.partition(" x ")
        options = ["fit", "--model", model, "--gpu", gpu, "--tp", tp, "--json"]
        found = json.loads(CliRunner().invoke(app, options).output)
        assert f"{found['weights']['per_rank'] / GIB:.1f}" == weights
        assert f"{found['fit']['budget'] / GIB:.1f}" == cache
        assert f"{found['fit']['tokens']:,}" == tokens
        others = {(o["kv_dtype"], o["index_dtype"]): o["tokens"] for o in found["alternatives"]}
        assert f"{others['fp8', 'bf16']:,}" == fp8
        assert f"{others['fp8', 'int8']:,}" == with_int8


def test_every_variable_is_documented() -> None:
    listed = {row[0].strip("`") for row in table_rows("operations", f"`{PREFIX}")}
    assert listed == {PREFIX + field.name.upper() for field in fields(Settings)}


def test_every_metric_is_documented() -> None:
    assert len(plugin_metrics()) >= 8
    listed = {
        row[0].strip("`").partition("{")[0] for row in table_rows("operations", "`m3_plugin:")
    }
    assert {sample_name(name) for name in listed} == plugin_metrics()


def commands() -> list[str]:
    """Every `m3-plugin ...` that a guide tells to type."""
    found = []
    for path in (*(DOCS / f"{name}.md" for name in GUIDES), DOCS.parent / "README.md"):
        text = path.read_text().replace("\\\n", " ")
        fenced = re.findall(r"^(?:[A-Z_0-9]+=\S+ )*(m3-plugin [a-z][^#\n]+)", text, re.MULTILINE)
        found += [*fenced, *re.findall(r"`(m3-plugin [^`]*--[^`]+)`", text)]
    return sorted({" ".join(command.split()) for command in found})


@pytest.mark.parametrize("line", commands())
def test_documented_commands_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word in known


def test_messages_in_troubleshooting_are_really_written_somewhere() -> None:
    """Fragments of our own messages, as they stand in the sources."""
    root = DOCS.parent
    sources = [*root.glob("m3_plugin/**/*.py"), *root.glob("integrations/**/*.py")]
    text = " ".join(re.sub(r'"\s*f?"', "", path.read_text().replace("\n", " ")) for path in sources)
    text = " ".join(text.split())
    for fragment in (
        "is NOT ACTIVE, the host's own MiniMax-M3 will be used",
        "is outside the tested window",
        "unknown environment variable",
        "no MSA kernels for device",
        "gives wrong results on",
        "checkpoint does not match its config.json",
        "where its header promises",
        "did you mean",
        "does not fit",
        "do not hold the same rows",
        "were recorded from different models",
    ):
        assert fragment in text, fragment
        told = (DOCS / "troubleshooting.md").read_text()
        assert fragment in told, fragment


def test_every_screen_is_shown_and_says_where_it_was_made() -> None:
    guides = "".join(path.read_text() for path in DOCS.glob("*.md"))
    screens = sorted((DOCS / "screens").iterdir())
    assert [screen.name for screen in screens if f"screens/{screen.name}" not in guides] == []
    found = json.loads((DOCS / "screens" / "bench-serve.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{12}", found["machine"]["commit"])
    assert found["machine"]["cpu"]
    shares = {row["server"]: row["msa_share"] for row in found["rows"]}
    assert set(shares) == {"m3-plugin", "dense"}
    assert 0 < shares["m3-plugin"] < 1
    assert shares["dense"] is None


def test_every_test_that_a_page_names_exists() -> None:
    """`test_x.py` of any folder, `tests/...` as a path, `test_x.py::test_y` with that function."""
    named = {
        (page.name, name)
        for page in [DOCS.parent / "README.md", DOCS.parent / "SECURITY.md", *DOCS.glob("*.md")]
        for name in re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py(?:::\w+)?)`", page.read_text())
    }
    assert len(named) >= 30
    files = {
        path.relative_to(DOCS.parent).as_posix(): path
        for path in (DOCS.parent / "tests").rglob("test_*.py")
    }

    def exists(name: str) -> bool:
        path, _, function = name.partition("::")
        found = [file for at, file in files.items() if f"/{at}".endswith(f"/{path}")]
        return any(f"def {function}" in file.read_text() for file in found)

    assert sorted(pair for pair in named if not exists(pair[1])) == []


def test_the_public_eagle3_head_is_named_where_drafts_are_described() -> None:
    for page in ("support.md", "speculative-decoding.md"):
        assert "Inferact/MiniMax-M3-EAGLE3" in (DOCS / page).read_text()


def test_screens_and_figures_name_no_folder_of_the_machine_they_were_made_on() -> None:
    written = [*(DOCS / "screens").glob("*.[jt]*"), *(DOCS / "results").glob("*.json")]
    texts = {path: path.read_text() for path in written if path.suffix in {".json", ".txt"}}
    assert len(texts) >= 4
    assert [path for path, text in texts.items() if re.search(r"(?<!\S)/\w+/\w+/", text)] == []


def test_make_targets_named_anywhere_exist() -> None:
    root = DOCS.parent
    rules = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    texts = [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for text in texts:
        named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text.read_text(), re.MULTILINE)
        for first, second in named:
            assert (first or second) in rules, f"{text.name}: make {first or second}"


def test_the_recipe_for_ruler_is_what_lm_eval_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    if not LM_EVAL.exists():
        pytest.skip("no .venv/lm-eval: run make test")
    monkeypatch.syspath_prepend(LM_EVAL)
    harness = importlib.import_module("lm_eval._cli.harness")
    text = (DOCS / "evaluation.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^lm_eval run .*$", text, re.MULTILINE)
    monkeypatch.setattr("sys.argv", shlex.split(line))
    parsed = vars(harness.HarnessCLI().parse_args())
    assert parsed["tasks"] == ["ruler"]
    assert parsed["model"] == "local-completions"
    assert parsed["model_args"]["base_url"].endswith("/v1/completions")
    assert max(parsed["metadata"]["max_seq_lengths"]) <= parsed["model_args"]["max_length"]


def told(modes: tuple[Mode, ...]) -> str:
    """Ways of feeding, in the words of docs/parsers.md."""
    words: dict[tuple[Mode, ...], str] = {
        MODES: "always",
        STREAMED: "streamed",
        ("whole",): "not streamed",
        ("piece", "random"): "streamed, many tokens at once",
        ("characters", "random"): "streamed, marker in pieces",
        ("random",): "streamed, at rare cuts",
    }
    return words[modes]


def parser_rows() -> list[list[str]]:
    """A row per case: whether each release gives the expected reply."""
    rows = []
    for case in CASES:
        row = [case.name, case.thinking]
        for host, release in PARSERS:
            found = [d for d in case.deviations if d.concerns(host, release)]
            differing: tuple[Mode, ...] = tuple(
                m for m in MODES if any(m in d.modes for d in found)
            )
            row.append(f"differs {told(differing)}" if differing else "right")
        rows.append(row)
    return rows


def deviation_rows() -> list[list[str]]:
    """A row per thing that a release gives instead."""
    return [
        [case.name, f"{TITLES[d.host]} {d.releases}", told(d.modes), d.because]
        for case in CASES
        for d in case.deviations
    ]


@pytest.mark.parametrize("rows", [parser_rows(), deviation_rows()], ids=["cases", "deviations"])
def test_what_hosts_parse_is_documented_as_it_is_tested(rows: list[list[str]]) -> None:
    names = {case.name for case in CASES}
    documented = [row for row in table_rows("parsers", "") if row[0] in names]
    assert [row for row in documented if len(row) == len(rows[0])] == rows


@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_the_accepted_releases_are_the_same_everywhere(host: str) -> None:
    """Change log, install page and README say what the adapter accepts."""
    root = DOCS.parent
    source = (root / "integrations" / host / f"m3_{host}" / "compat.py").read_text()
    ((low, below),) = re.findall(r'minimum="([\d.]+)",\s+below="([\d.]+)"', source)
    *front, last = below.split(".")
    accepted = f"{low} to {'.'.join([*front, str(int(last) - 1)])}"
    title = TITLES[host]
    latest = (root / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert f"| {title} | {accepted} |" in latest
    assert f"| {title} | {accepted} |" in (DOCS / "install.md").read_text()
    assert f"{title} {accepted}" in (root / "README.md").read_text()
    assert f"{host}>={low},<{below}" in (root / "pyproject.toml").read_text()
