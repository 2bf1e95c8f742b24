"""Counts what a run of the engine tests starts: each start of a host costs seconds, and adds up."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any, Literal

Kind = Literal["engine", "server", "python process"]

SERVERS = ("vllm.entrypoints.openai.api_server", "sglang.launch_server")

# (kind, test file) of every start of this run
started: Counter[tuple[Kind, str]] = Counter()


def count(kind: Kind) -> None:
    """Count a start for the test that runs now."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "(collection)")
    started[kind, test.partition("::")[0]] += 1


def count_processes() -> None:
    """From now on count every Python process that this one starts by `subprocess`."""
    sys.addaudithook(_see)


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "subprocess.Popen":
        return
    command = [str(part) for part in arguments[1]]
    if "python" in os.path.basename(command[0]):
        count("server" if any(name in command for name in SERVERS) else "python process")


def report() -> list[str]:
    """Lines for the end of a run: starts by kind, then by test file."""
    kinds: Counter[str] = Counter()
    files: dict[str, Counter[str]] = {}
    for (kind, file), number in started.items():
        kinds[kind] += number
        files.setdefault(file, Counter())[kind] += number
    lines = [_counted(kinds)]
    for file, counts in sorted(files.items(), key=lambda item: -item[1].total()):
        lines.append(f"  {file}: {_counted(counts)}")
    return lines


def _counted(counts: Counter[str]) -> str:
    return ", ".join(
        f"{number} {kind}{'es' if kind.endswith('s') else 's'}"
        if number > 1
        else f"{number} {kind}"
        for kind, number in sorted(counts.items())
    )
