"""`m3-plugin demo`: the whole way, from an empty folder to answers over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys


def test_demo_answers_everything_right_and_reports_json() -> None:
    command = [sys.executable, "-m", "m3_plugin.cli", "demo", "--json", "--long-tokens", "4096"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["right"] is True
    answers = {answer["label"]: answer for answer in report["answers"]}
    assert all(answer["received"] == answer["expected"] for answer in answers.values())
    again = answers["long chain again"]
    assert again["cached_tokens"] >= 4096
    read, visible = again["decode_blocks"]
    # four words and eos: four decode steps of 4 blocks, 2 layers, 4 groups
    assert read == 4 * 4 * 2 * 4
    assert visible > 5 * read
    assert again["decode_ms_per_token"] > 0
    assert "two pictures" in answers
