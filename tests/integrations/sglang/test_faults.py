"""Faults, one at a time, in real SGLang servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from m3_plugin.cli.hosts import HOSTS
from m3_plugin.host.serving import sglang_command
from tests.integrations.faults import FaultCases
from tests.integrations.sglang.test_server import OPTIONS, SERVER_ENVIRONMENT


class TestFaults(FaultCases):
    parts: ClassVar = {
        "sglang::scheduler": "crashed with exit code -9",
        "sglang::detokenizer": "crashed with exit code -9",
        # all others are the kernel's to end with it
        "sglang.launch_server": "",
    }
    worker = "sglang::scheduler"
    plugins = ("sglang.srt.plugins", "tests.integrations.sglang.spoilers")

    # it lets in what there is room for if hardly a word is answered, which it never does otherwise
    crowded = (*HOSTS["sglang"].load_options(8192, 8192, 16), "--schedule-conservativeness", "0.01")
    crowds: ClassVar = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"}

    def command(
        self, model: Path, port: int, *, ranks: int = 1, options: Sequence[str] = ()
    ) -> list[str]:
        return sglang_command(model, port=port, options=(*OPTIONS, "--tp", str(ranks), *options))

    def environment(self) -> dict[str, str]:
        return {**SERVER_ENVIRONMENT, "M3_PLUGIN_CHECK": "1"}
