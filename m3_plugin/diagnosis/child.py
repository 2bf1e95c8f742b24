"""Questions put to a module in a process of its own, which may die without harm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from m3_plugin.host.children import child_environment, python

_MARK = "M3-PLUGIN-FACTS "


class ChildFailed(RuntimeError):
    """The child ended without an answer; the message is the end of what it wrote."""


def answer(facts: Mapping[str, Any]) -> None:
    """Print the answer of the running child; its other output may stand around it."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(facts)}\n")
    sys.stdout.flush()


def ask(module: str, *arguments: str, timeout_s: float = 300) -> tuple[dict[str, Any], str]:
    """Run `python -P -m module` and return the facts it answers with, and all it wrote.

    Raises
    ------
    ChildFailed : no answer, because it ended early or the time ran out.
    """
    command = python("-m", module, *arguments)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            env=child_environment({"PYTHONFAULTHANDLER": "1"}),
        )
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"no answer within {timeout_s:.0f} s") from None
    lines = done.stdout.splitlines()
    for line in reversed(lines):
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK)), done.stdout + done.stderr
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    raise ChildFailed(f"ended with {done.returncode}: " + " | ".join(said[-3:]))
