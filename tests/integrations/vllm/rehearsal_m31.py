"""MiniMax-M3.1's published config, resolved by vLLM as on GPUs that are not here.

    python -m tests.integrations.vllm.rehearsal_m31 FOLDER_OF_A_CONFIG_JSON

As `rehearsal`; with M3_PLUGIN_DISABLE=1 it says what vLLM does by itself. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from m3_plugin.host.torchvision_ops import declare_missing_ops
from tests.integrations.vllm.rehearsal import CHIPS, become_a_gpu, report, resolved

COMMANDS = {
    "plain": "--tensor-parallel-size 4",
    "fp8 cache": "--tensor-parallel-size 4 --kv-cache-dtype fp8 --block-size 128",
}


def facts_of(config: Any, chip: tuple[int, int, int]) -> dict[str, Any]:
    """The class that would be built, how weights are read, and what a worker takes."""
    from vllm.model_executor.models import ModelRegistry

    model = config.model_config
    found: Any = ModelRegistry.resolve_model_cls(model.architectures, model)[0]
    facts: dict[str, Any] = {"model": found.module_name, "quantization": model.quantization}
    if os.environ.get("M3_PLUGIN_DISABLE") != "1":
        facts["workspace_mib"] = report(config, chip)["workspace_mib"]
    return facts


def main(folder: str) -> None:
    declare_missing_ops()
    gpu = become_a_gpu()
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # whether a class can be imported on this machine is not asked
    lazy: Any = registry._LazyRegisteredModel
    lazy.load_model_cls = lambda self: self
    found: dict[str, Any] = {}
    for name, chip in CHIPS.items():
        gpu.chip = chip
        for command, typed in COMMANDS.items():
            try:
                found[f"{name}: {command}"] = facts_of(resolved(folder, typed), chip)
            except Exception as error:
                found[f"{name}: {command}"] = {"error": f"{type(error).__name__}: {error}"}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
