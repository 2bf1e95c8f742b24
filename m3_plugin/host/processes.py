"""Child processes of this interpreter that import nothing from the folder they start in.

Commands are typed in checkpoint folders, and a checkpoint is a stranger's: `python -m` would put
that folder first on `sys.path`, and a `triton.py` in it would run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def python(*arguments: str) -> list[str]:
    """Command line of the running interpreter, without the current folder on its `sys.path`."""
    return [sys.executable, "-P", *arguments]


def environment(additions: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for such a process: those of this one, with additions over them.

    `PYTHONSAFEPATH` says `-P` to the processes that it starts in turn. Entries of `PYTHONPATH` that
    depend on the current folder (empty or relative ones) are left out.
    """
    variables = {**os.environ, **(additions or {}), "PYTHONSAFEPATH": "1"}
    paths = variables.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [path for path in paths if os.path.isabs(path)]:
        variables["PYTHONPATH"] = os.pathsep.join(kept)
    return variables
