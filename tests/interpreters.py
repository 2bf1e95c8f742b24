"""Programs and interpreters of their own, for what lasts as long as a process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What a script prints before an answer in JSON, so that a host's own lines do not count.
MARK = "ANSWER "


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, however it ends.

    Parameters
    ----------
    environment : variables beside ours
    folder : to run in
    """
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def interpret(
    *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, which must end well."""
    command = [sys.executable, *map(str, arguments)]
    done = run(command, environment=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def answered(done: subprocess.CompletedProcess[str]) -> list[Any]:
    """What a script answered, in its order."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return [json.loads(line.removeprefix(MARK)) for line in lines]


def report(
    module: str,
    *arguments: object,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """The JSON that a module writes into the file that is its last argument."""
    target = folder / "report.json"
    interpret("-m", module, *arguments, target, environment=environment)
    return json.loads(target.read_text())
