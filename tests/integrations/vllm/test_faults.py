"""Faults, one at a time, in real vLLM servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from m3_plugin.cli.hosts import HOSTS
from m3_plugin.host.serving import vllm_command
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from tests.integrations.faults import FaultCases
from tests.integrations.vllm.test_server import OPTIONS, SERVER_ENVIRONMENT


class TestFaults(FaultCases):
    parts: ClassVar = {
        "VLLM::Worker": "died unexpectedly",
        "VLLM::EngineCore": "engine core exited unexpectedly",
        # ours: vLLM's engine would stay
        "vllm.entrypoints": "which started this engine, is gone",
    }
    worker = "VLLM::Worker"
    plugins = ("vllm.general_plugins", "tests.integrations.vllm.spoilers")

    # one page of the pool is nobody's
    crowded = HOSTS["vllm"].load_options(8192, 8192 + PAGED_BLOCK_SIZE, 16)

    def command(
        self, model: Path, port: int, *, ranks: int = 1, options: Sequence[str] = ()
    ) -> list[str]:
        # without it vLLM drops what runs at SIGTERM, and ends once the last client has given up
        ending = ("--shutdown-timeout", "200")
        all_options = (*OPTIONS, *ending, "--tensor-parallel-size", str(ranks), *options)
        return vllm_command(model, port=port, options=all_options)

    def environment(self) -> dict[str, str]:
        return {**SERVER_ENVIRONMENT, "M3_PLUGIN_CHECK": "1"}
