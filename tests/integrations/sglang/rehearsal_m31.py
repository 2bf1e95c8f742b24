"""Start M3.1 by SGLang's command lines as far as a machine without a GPU can, on each chip.

    python -m tests.integrations.sglang.rehearsal_m31 CHECKPOINT REPORT

As `rehearsal`: a process of its own in which SGLang's own classes resolve the arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.integrations.m31 import documented_options
from tests.integrations.sglang.rehearsal import CHIPS, chip, resolved

COMMANDS = {
    "documented": documented_options("sglang.launch_server"),
    "plain": ["--tp", "4", "--chunked-prefill-size", "8192"],
    "fp8 cache": ["--tp", "4", "--chunked-prefill-size", "8192", "--kv-cache-dtype", "fp8_e4m3"],
}
NAMES = ("attention_backend", "page_size", "moe_runner_backend", "moe_a2a_backend", "quantization")


def facts_of(record: Any) -> dict[str, Any]:
    """What a start on these arguments would do."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.utils import get_model_architecture

    view = resolving_view(record)
    model, _ = get_model_architecture(ModelConfig.from_server_args(record))
    facts = {name: getattr(view, name) for name in (*NAMES, "kv_cache_dtype")}
    return facts | {"model": model.__module__}


def main(checkpoint: str, report: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    found: dict[str, Any] = {}
    for name in CHIPS:
        with chip(name):
            for command, given in COMMANDS.items():
                try:
                    outcome: Any = facts_of(resolved(["--model-path", checkpoint, *given]))
                except (ValueError, NotImplementedError, AssertionError) as error:
                    outcome = f"{type(error).__name__}: {error}"
                found[f"{name}, {command}"] = outcome
    Path(report).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
