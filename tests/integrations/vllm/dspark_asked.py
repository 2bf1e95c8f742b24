"""What vLLM says to each way of asking for M3.1's draft, before anything is loaded.

    python -m tests.integrations.vllm.dspark_asked CHECKPOINT REPORT

A process of its own, in which the plugin is loaded as in a server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOKENS = {"num_speculative_tokens": 7}


def ways(checkpoint: str) -> dict[str, dict[str, Any]]:
    """--speculative-config by what it asks for."""
    draft = {"model": f"{checkpoint}/dspark"}
    return {
        "the folder": draft,
        "the folder as dspark": {"method": "dspark", **draft},
        "the folder as dflash": {"method": "dflash", **draft},
        "the folder as eagle3": {"method": "eagle3", **draft},
        "the target as dflash": {"method": "dflash", "model": checkpoint},
        "dspark": {"method": "dspark"},
        "DSPARK": {"method": "DSPARK"},
        "dflash": {"method": "dflash"},
    }


def answer(checkpoint: str, asked: dict[str, Any]) -> str:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=checkpoint,
        speculative_config=asked | TOKENS,
        max_model_len=1024,
        dtype="bfloat16",
    )
    try:
        arguments.create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def main(checkpoint: str, report: str) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {name: answer(checkpoint, asked) for name, asked in ways(checkpoint).items()}
    Path(report).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
