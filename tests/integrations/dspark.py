"""M3.1's draft asked for in every way that a host has, and MTP: what all hosts' tests share.

A host's `dspark_asked` lists its ways and resolves each in a process of its own; its `test_dspark`
says which sentence it expects where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from m3_plugin.testing.dspark import add_dspark
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from tests.integrations.forked import Interpreter

Asked = TypeVar("Asked")
# of a draft that is named by a folder or a model
REFUSED = "is not served with MiniMax-M3: DSpark and DFlash drafts, M3.1's in dspark/ among them"

# of a module that M3 has and M3.1 has not
NO_MTP = "holds no MTP weights (model.mtp.layers.*)"


def every_way(interpreter: Interpreter, asked: str, folder: Path) -> dict[str, str]:
    """What a host says to each of its ways, about a checkpoint with a draft beside it.

    Parameters
    ----------
    interpreter : of programs that have imported the host
    asked : the host's `dspark_asked`
    folder : takes the checkpoint and the report
    """
    checkpoint = folder / "m31"
    add_dspark(write_random_checkpoint(checkpoint, preset=M31_PRESETS["engine"]))
    said: dict[str, str] = interpreter.report(asked, checkpoint, folder=folder)
    return said


def write_answers(
    ways: Mapping[str, Asked], start: Callable[[Asked], object], *, report: str
) -> None:
    """Ask in each way and write what was said; "served" where nothing was refused.

    Parameters
    ----------
    start : resolves a server's arguments as far as it goes without loading
    """
    said = {}
    for name, asked in ways.items():
        try:
            start(asked)
            said[name] = "served"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    Path(report).write_text(json.dumps(said, indent=1))
