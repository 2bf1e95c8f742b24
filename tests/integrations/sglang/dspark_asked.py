"""What SGLang says to each way of asking for M3.1's draft, before anything is loaded.

    python -m tests.integrations.sglang.dspark_asked CHECKPOINT REPORT

A process of its own, in which SGLang's own classes resolve the arguments as on a chip.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.integrations.sglang.rehearsal import chip, resolved

CHIP = "H100"


def ways(checkpoint: str) -> dict[str, list[str]]:
    """Options by what they ask for."""
    draft = ["--speculative-draft-model-path", f"{checkpoint}/dspark"]
    return {
        "DSPARK": ["--speculative-algorithm", "DSPARK"],
        "DSPARK and the folder": ["--speculative-algorithm", "DSPARK", *draft],
        "DFLASH and the folder": ["--speculative-algorithm", "DFLASH", *draft],
        "EAGLE3 and the folder": ["--speculative-algorithm", "EAGLE3", *draft],
        "NEXTN and the folder": ["--speculative-algorithm", "NEXTN", *draft],
    }


def answer(argv: list[str]) -> str:
    from m3_sglang.options import require_served

    try:
        # as the backend asks once more, of what was resolved
        require_served(resolved(argv))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def main(checkpoint: str, report: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    with chip(CHIP):
        found = {
            name: answer(["--model-path", checkpoint, *options])
            for name, options in ways(checkpoint).items()
        }
    Path(report).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
