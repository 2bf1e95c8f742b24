"""What the processes of a server use, from `/proc`: memory, open files, threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes
    ----------
    name : as it calls itself, in a few words
    rss_mb : resident memory in MB of 1e6 bytes
    files : open file descriptors
    """

    pid: int
    name: str
    rss_mb: float
    files: int
    threads: int


def processes_of_session(session: int) -> list[Process]:
    """All processes of a session, which is what `ServerProcess` starts; empty without `/proc`."""
    return sorted(_found(session), key=lambda process: process.pid)


def _found(session: int) -> Iterator[Process]:
    for folder in _PROC.glob("[0-9]*"):
        # processes end while they are looked at
        with suppress(OSError, IndexError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            # state, parent, group, session, ..., threads as the 18th field after the name
            if int(fields[3]) != session or fields[0] == "Z":
                continue
            yield Process(
                pid=int(folder.name),
                name=_name(folder),
                rss_mb=round(int((folder / "statm").read_text().split()[1]) * _PAGE / 1e6, 1),
                files=sum(1 for _ in (folder / "fd").iterdir()),
                threads=int(fields[17]),
            )


def _name(folder: Path) -> str:
    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    if not words:
        return (folder / "comm").read_text().strip()
    # python -P -m a.b.c --options: the module is the name
    if "-m" in words[:4]:
        return words[words.index("-m") + 1]
    if "multiprocessing" in " ".join(words):
        return (folder / "comm").read_text().strip()
    return words[0].rpartition("/")[2][:40]
