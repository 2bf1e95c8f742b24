"""Machines on which a server is started by a test: disks without room, a clock that jumps."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

CLOCK_SOURCE = Path(__file__).with_name("clock.c")
CLOCK_VARIABLE = "M3_TEST_CLOCK"
# Mounts are seen by the command and its children alone, and go away with them.
_DISKS = """
set -e
mount -t tmpfs -o size=256k,mode=700 none "$1"
mkdir -m 700 "$1/m3-plugin" "$1/m3-plugin/native"
cat /dev/zero > "$1/filler" 2> /dev/null || true
mount -t tmpfs -o ro none "$2"
shift 2
exec "$@"
"""


@cache
def _own_mounts() -> tuple[str, ...]:
    """Command that gives a child mounts of its own; empty where nobody may have them."""
    as_root = () if os.geteuid() == 0 else ("--map-root-user",)
    command = ("unshare", "--mount", *as_root)
    if shutil.which(command[0]) is None:
        return ()
    tried = subprocess.run(
        [*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return command if tried.returncode == 0 else ()


@dataclass(frozen=True)
class Disks:
    """Two folders that are file systems of their own to a command.

    Attributes
    ----------
    full : takes no byte; has the folders in which C++ kernels are kept
    readonly : takes no file
    """

    full: Path
    readonly: Path

    @classmethod
    def below(cls, folder: Path) -> Disks:
        """In new folders; skips the test where a user may not mount."""
        if not _own_mounts():
            pytest.skip("a full disk is mounted by the test, which this user may not do here")
        disks = cls(folder / "full", folder / "readonly")
        disks.full.mkdir()
        disks.readonly.mkdir()
        return disks

    def seen_by(self, command: Sequence[str]) -> list[str]:
        """The command, to which the folders are such disks."""
        script = ["sh", "-c", _DISKS, "sh", str(self.full), str(self.readonly)]
        return [*_own_mounts(), *script, *command]

    def full_as_seen(self, pid: int) -> Path:
        """The full disk as a process sees it."""
        return Path(f"/proc/{pid}/root{self.full}")


class JumpingClock:
    """A wall clock of a server, which the test sets; monotonic clocks stay as they are.

    Parameters
    ----------
    folder : for the preloaded library and the offset
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        library = folder / "clock.so"
        compiler = os.environ.get("CC", "cc")
        flags = ["-shared", "-fPIC", "-O1", str(CLOCK_SOURCE), "-o", str(library), "-ldl"]
        subprocess.run([compiler, *flags], check=True)
        offset = folder / "offset"
        offset.write_bytes(struct.pack("q", 0))
        self.environment = {"LD_PRELOAD": str(library), CLOCK_VARIABLE: str(offset)}
        with offset.open("r+b") as file:
            self._offset = mmap.mmap(file.fileno(), 8)

    def jump(self, seconds: int) -> None:
        """From now on the clock is so far off the real one."""
        self._offset[:] = struct.pack("q", seconds)
