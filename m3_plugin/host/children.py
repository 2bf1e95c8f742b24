"""How a python of our own is started: with nothing of the current folder on its import path.

`python -m` and `python -c` put the current folder first on `sys.path`. Whoever looks at a
stranger's checkpoint stands in it, and a `triton.py` that lies there would run in the child. So
every child starts with `-P`, and its environment asks the same of its own children.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = (LOOPBACK, "localhost", "::1")


def is_loopback(url: str) -> bool:
    """Whether a URL means this machine itself, which no proxy can reach."""
    return urlsplit(url).hostname in _LOOPBACK_NAMES


def python(*arguments: str) -> list[str]:
    """Command line of the running interpreter that never imports from the current folder."""
    return [sys.executable, "-P", *arguments]


def child_environment(
    additions: Mapping[str, str] | None = None, *, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Environment of a child: no way to the current folder, no proxy in front of loopback.

    Parameters
    ----------
    additions : variables of this child; they win over inherited ones
    inherited : variables of the running process

    Returns
    -------
    The variables, with `PYTHONSAFEPATH` for pythons that the child starts, and `PYTHONPATH` without
    entries that are empty or relative, as these mean the current folder too.
    """
    environment = {**inherited, **(additions or {})}
    environment["PYTHONSAFEPATH"] = "1"
    given = environment.pop("PYTHONPATH", "")
    if absolute := [entry for entry in given.split(os.pathsep) if os.path.isabs(entry)]:
        environment["PYTHONPATH"] = os.pathsep.join(absolute)
    for name in ("no_proxy", "NO_PROXY"):
        excepted = [host for host in environment.get(name, "").split(",") if host.strip()]
        excepted += [host for host in _LOOPBACK_NAMES if host not in excepted]
        environment[name] = ",".join(excepted)
    return environment
