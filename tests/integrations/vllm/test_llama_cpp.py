"""A real llama.cpp, where one was built: the GGUF file's answers, and the benchmark beside ours.

LLAMA_CPP_BUILD names the folder of the build, or its llama-server. docs/gguf.md says which release
was tested and how it was built.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.cli.bench.llama_cpp import VARIANTS, Variant, attention_of, find_server, started
from m3_plugin.cli.bench.report import GateError
from m3_plugin.testing.prompts import needle_prompt
from tests.console import in_one_line
from tests.plugin.cli.schemas import checked

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif("LLAMA_CPP_BUILD" not in os.environ, reason="no LLAMA_CPP_BUILD"),
]
MSA, DEFAULTS = VARIANTS
# llama.cpp reads the file's BF16 and F32
DTYPES = ("bfloat16", "float32")


@pytest.fixture(scope="module")
def built() -> Path:
    return find_server(Path(os.environ["LLAMA_CPP_BUILD"]))


@pytest.fixture(scope="module", params=DTYPES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    command = ["tiny", str(folder), "--gguf", "--dtype", request.param]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return folder / "model.gguf"


def post(url: str, body: dict[str, Any]) -> Any:
    reply = httpx.post(url, json=body, timeout=600, trust_env=False)
    reply.raise_for_status()
    return reply.json()


@pytest.mark.parametrize("variant", VARIANTS, ids=["msa", "defaults"])
def test_answers(built: Path, file: Path, variant: Variant, tmp_path: Path) -> None:
    with started(
        built, file, variant, context=8192, threads=2, log=tmp_path / "server.log"
    ) as server:
        for seed, tokens in ((0, 1536), (1, 4096), (2, 4096)):
            prompt = needle_prompt(seed, num_tokens=tokens)
            # the words of the file have the one reading that they are meant to have
            read = post(f"{server.url}/tokenize", {"content": prompt.text})["tokens"]
            assert read == list(prompt.token_ids)
            asked = {"prompt": prompt.text, "temperature": 0, "n_predict": prompt.max_tokens}
            answer = post(f"{server.url}/completion", asked)["content"]
            assert answer == (prompt.expected_text if variant is MSA else prompt.dense_answer)
        assert attention_of(server, variant) == ("msa" if variant is MSA else "dense")
        command = ["eval", "needle", "--url", server.url, "--needles", "constructed", "--json"]
        result = CliRunner().invoke(app, [*command, "--contexts", "2048", "--depths", "0,50,100"])
        found = checked("eval-needle", result.stdout)
        assert result.exit_code == (0 if variant is MSA else 1), result.output
        assert {entry["dense"] for entry in found["results"]} == {variant is not MSA}


def test_sparse_attention_that_is_not_on_is_no_peer(
    built: Path, file: Path, tmp_path: Path
) -> None:
    without = Variant(("-fa", "off", "-np", "1"), wanted="msa")
    with (
        started(built, file, without, context=2048, threads=2, log=tmp_path / "log") as server,
        pytest.raises(GateError, match="as dense attention does") as raised,
    ):
        attention_of(server, without)
    assert "its log:" in str(raised.value)
    assert "flash attention disabled" in str(raised.value)


@pytest.mark.vllm
def test_beside_ours(built: Path, tmp_path: Path) -> None:
    command = ["bench", "cpu", "--contexts", "", "--prefill-contexts", "", "--peers", "llama.cpp"]
    command += ["--llama-cpp", str(built), "--step-contexts", "2304,640", "--prefill-rows", "128"]
    picture, numbers = tmp_path / "engines.png", tmp_path / "engines.json"
    result = CliRunner().invoke(
        app, [*command, "--plot", str(picture), "--output", str(numbers)], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    found = checked("bench-cpu", numbers.read_text())["beside"]
    ours, msa, defaults = found["engines"]
    assert [ours["attention"], msa["attention"], defaults["attention"]] == ["msa", "msa", "dense"]
    names = [engine["name"] for engine in found["engines"]]
    assert [(row["context"], row["engine"]) for row in found["rows"]] == [
        (context, name) for context in (640, 2304) for name in names
    ]
    for row in found["rows"]:
        assert row["prompt_ms"] > 0
        assert row["token_low_ms"] <= row["token_ms"] <= row["token_high_ms"]
        parts = [row[f"{part}_ms"] for part in ("dense", "select", "attend", "store", "rest")]
        if row["engine"] == ours["name"]:
            assert all(part > 0 for part in parts)
            assert sum(parts) == pytest.approx(row["token_ms"])
        else:
            assert set(parts) == {None}
    assert found["left_out"] == {}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "parts of a decode step of ours" in in_one_line(result.stdout)
