"""Faults, one at a time, in real SGLang servers."""

from __future__ import annotations

from pathlib import Path

from m3_plugin.host.serving import sglang_command
from tests.integrations.faults import FaultCases
from tests.integrations.sglang.test_server import OPTIONS, SERVER_ENVIRONMENT


class TestFaults(FaultCases):
    parts = ("sglang::scheduler", "sglang::detokenizer", "sglang.launch_server")
    worker = "sglang::scheduler"
    plugin = ("sglang.srt.plugins", "tests.integrations.sglang.spoiled_page")

    def command(self, model: Path, port: int, *, ranks: int = 1) -> list[str]:
        return sglang_command(model, port=port, options=(*OPTIONS, "--tp", str(ranks)))

    def environment(self) -> dict[str, str]:
        return {**SERVER_ENVIRONMENT, "M3_PLUGIN_CHECK": "1"}
