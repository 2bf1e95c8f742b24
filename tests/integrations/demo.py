"""`m3-plugin demo` on one host: the whole way, from an empty folder to answers over HTTP."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.planted import plant, ran
from tests.plugin.cli.schemas import checked


def check_demo(host: str, *, speculative: bool = False) -> None:
    """Run the demo and compare its JSON report with what is known beforehand."""
    options = ["--framework", host, "--json", "--long-tokens", "4096"]
    options += ["--speculative"] if speculative else []
    command = [sys.executable, "-P", "-m", "m3_plugin.cli", "demo", *options]
    with tempfile.TemporaryDirectory() as folder:
        witness = Path(folder) / "witness"
        plant(Path(folder) / "here", witness=witness)
        result = subprocess.run(
            command,
            cwd=Path(folder) / "here",
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert ran(witness) == []
    assert result.returncode == 0, result.stderr
    report = checked("demo", result.stdout)
    assert report["right"] is True
    answers = {answer["label"]: answer for answer in report["answers"]}
    assert all(answer["received"] == answer["expected"] for answer in answers.values())
    assert "two pictures" in answers
    again = answers["long chain again"]
    assert again["cached_tokens"] >= 4096
    read, visible = again["decode_blocks"]
    # four words and eos: four decode steps of 4 blocks, 2 layers, 4 groups
    assert read == 4 * 4 * 2 * 4
    assert visible > 5 * read
    assert again["decode_ms_per_token"] > 0
    assert [drafted["label"] for drafted in report["speculative"]] == list(answers) * speculative
    for drafted in report["speculative"]:
        assert drafted["received"] == drafted["expected"]
        # the colour of a picture is the target's own first token; nothing is left but its end
        assert drafted["acceptance"] >= 0.95
        assert drafted["tokens_per_step"] == 4
    assert {answer["tokens_per_step"] for answer in answers.values()} == {1}
