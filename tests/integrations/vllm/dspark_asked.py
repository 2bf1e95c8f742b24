"""What vLLM says to each way of asking for M3.1's draft, before anything is loaded.

    python -m tests.integrations.vllm.dspark_asked CHECKPOINT REPORT

A process of its own, in which the plugin is loaded as in a server.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.integrations.dspark import write_answers

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
        "MTP": {"method": "mtp"},
    }


def main(checkpoint: str, report: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    def start(asked: dict[str, Any]) -> None:
        from m3_vllm.speculation import require_speculation

        arguments = EngineArgs(
            model=checkpoint,
            speculative_config=asked | TOKENS,
            max_model_len=1024,
            dtype="bfloat16",
        )
        # as each worker asks once more, of what was resolved
        require_speculation(arguments.create_engine_config())

    load_general_plugins()
    write_answers(ways(checkpoint), start, report=report)


if __name__ == "__main__":
    main(*sys.argv[1:])
