"""Looking into a running server: needles, recorded selections, and the plugin's own metrics.

A host's `test_server.py` derives `InsightCases` and starts its server with `insight_environment`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from typer.testing import CliRunner, Result

from m3_plugin import __version__
from m3_plugin.attention.recorder import FILE_PATTERN
from m3_plugin.cli import app
from m3_plugin.cli.blocks_summary import summarise
from m3_plugin.host.serving import ServerProcess
from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.server import MODEL
from tests.plugin.cli.schemas import checked

_FOLDER = "selection"


def insight_environment(folder: Path) -> dict[str, str]:
    """Variables of a server whose log lies in `folder`."""
    counters = folder / "prometheus"
    counters.mkdir()
    return {
        "M3_PLUGIN_RECORD_BLOCKS": str(folder / _FOLDER),
        "M3_PLUGIN_STATISTICS": "1",
        "M3_PLUGIN_TIMINGS": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(counters),
    }


def eval_needle(url: str, output: Path, *options: str) -> Result:
    """`m3-plugin eval needle` against a server."""
    server = ("--url", url, "--model", MODEL, "--output", str(output))
    return CliRunner().invoke(app, ["eval", "needle", *server, *options])


class InsightCases:
    """Derive beside `ServerCases`."""

    def test_every_needle_is_found(self, server: ServerProcess, tmp_path: Path) -> None:
        output = tmp_path / "needle.json"
        grid = ("--needles", "constructed", "--contexts", "1400,3000", "--depths", "0,50,100")
        result = eval_needle(server.url, output, *grid)
        assert result.exit_code == 0, result.output
        results = checked("eval-needle", output.read_text())["results"]
        assert len(results) == 6
        assert all(r["received"] == r["expected"] and r["right"] for r in results)
        assert all(abs(r["found_at"] - r["depth"]) < 0.15 for r in results)
        assert all(0 <= r["prompt_tokens"] - r["context"] < 200 for r in results)
        # all is known, so a server is no longer needed
        again = eval_needle("http://127.0.0.1:9", output, *grid)
        assert again.exit_code == 0, again.output

    def test_text_needles_have_the_wanted_length(
        self, server: ServerProcess, tmp_path: Path
    ) -> None:
        """The constructed checkpoint knows no English: it must be told wrong, never right."""
        output = tmp_path / "needle.json"
        result = eval_needle(server.url, output, "--contexts", "3000", "--depths", "50")
        assert result.exit_code == 1
        (found,) = json.loads(output.read_text())["results"]
        assert abs(found["prompt_tokens"] - 3000) < 150
        assert found["right"] is False

    def test_the_picture_shows_the_needles(
        self, server: ServerProcess, client: OpenAI, tmp_path: Path
    ) -> None:
        prompt = needle_prompt(711, num_tokens=4000)
        folder = server.log.parent / _FOLDER
        before = sum(file.stat().st_size for file in folder.glob(FILE_PATTERN))
        reply = client.completions.create(
            model=MODEL,
            prompt=list(prompt.token_ids),
            max_tokens=prompt.max_tokens,
            temperature=0,
        )
        assert reply.choices[0].text == prompt.expected_text
        (file,) = folder.glob(FILE_PATTERN)
        header = file.read_bytes().partition(b"\n")[0]
        copy = tmp_path / file.name
        copy.write_bytes(header + b"\n" + file.read_bytes()[before:])
        decode = summarise(tmp_path, phase="decode")
        assert decode.num_blocks == (4000 + prompt.max_tokens - 2) // 128 + 1
        # the first hop is answered by the prompt's last row, the others while decoding
        _, *hops = zip(prompt.groups, prompt.needle_blocks(), strict=True)
        for (layer, group), block in hops:
            shares = decode.layers[layer].heat[group]
            assert shares[block] >= 1 / decode.layers[layer].rows
        # no row reads more than the budget, whatever is drawn
        for layer in decode.layers:
            assert all(sum(shares) == pytest.approx(decode.topk, abs=0.01) for shares in layer.heat)

    def test_info_metric(self, server: ServerProcess) -> None:
        text = httpx.get(f"{server.url}/metrics").text
        (info,) = [line for line in text.splitlines() if line.startswith("m3_plugin:info{")]
        assert f'version="{__version__}"' in info
        assert 'device="cpu"' in info
        assert 'kernels="' in info
        assert info.endswith(" 1.0")

    @pytest.mark.extended
    def test_bench_serve_with_the_hosts_own_client(
        self, server: ServerProcess, constructed_checkpoint: Path, tmp_path: Path
    ) -> None:
        table = tmp_path / "rows.csv"
        load = ("--contexts", "700", "--output-tokens", "4", "--requests", "2")
        served = ("--url", server.url, "--model", MODEL, "--tokenizer", str(constructed_checkpoint))
        files = ("--csv", str(table), "--json")
        result = CliRunner().invoke(app, ["bench", "serve", *served, *load, *files])
        assert result.exit_code == 0, result.output
        assert len(checked("bench-serve", result.stdout)["rows"]) == 1
        (row,) = csv.DictReader(table.open())
        assert (row["server"], row["context"], row["requests"]) == ("m3-plugin", "700", "2")
        measured = ("ttft_ms", "tpot_ms", "output_tokens_per_s", "step_ms", "select_ms")
        assert all(float(row[name]) > 0 for name in measured)
        assert 0 < float(row["msa_share"]) < 1
