"""What SGLang says to each way of asking for M3.1's draft, before anything is loaded.

    python -m tests.integrations.sglang.dspark_asked CHECKPOINT REPORT

A process of its own, in which SGLang's own classes resolve the arguments as on a chip.
"""

from __future__ import annotations

import sys

from tests.integrations.dspark import write_answers
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
        "MTP": [
            *("--speculative-algorithm", "NEXTN"),
            *("--speculative-draft-model-path", checkpoint),
        ],
    }


def main(checkpoint: str, report: str) -> None:
    from sglang.srt.plugins import load_plugins

    def start(options: list[str]) -> None:
        from m3_sglang.options import require_served

        # as the backend asks once more, of what was resolved
        require_served(resolved(["--model-path", checkpoint, *options]))

    load_plugins()
    with chip(CHIP):
        write_answers(ways(checkpoint), start, report=report)


if __name__ == "__main__":
    main(*sys.argv[1:])
