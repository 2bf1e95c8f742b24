"""Installs with uv where that is installed, and with pip otherwise; both look where pip looks.

    python constraints/installer.py OPTIONS-AND-REQUIREMENTS-OF-PIP-INSTALL

uv takes a third of pip's time, but knows nothing of pip's configuration. So the indexes, folders
and constraints of pip's files and variables are handed to it as options. What uv does not bring to
an end, pip is asked for. `INSTALLER=pip` asks pip at once.

Runs with the pip of the interpreter that runs it, into that interpreter's environment; imports the
standard library only.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# Settings of pip that uv has as options, under the same names.
_LISTS = ("extra-index-url", "find-links", "constraint")
_SINGLE = ("index-url",)


def pip_settings(configured: str) -> dict[str, str]:
    """What `pip config list` says, without the sections of its files.

    Sections stand in the order of pip's own reading: variables override files, and what is said of
    `pip install` alone what is said of all.
    """
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in configured.splitlines():
        place, equals, value = line.partition("=")
        section, _, name = place.strip().rpartition(".")
        if equals and section in found:
            found[section][name] = str(ast.literal_eval(value))
    return {**found["global"], **found["install"], **found[":env:"]}


def uv_options(said: Mapping[str, str]) -> Iterator[str]:
    """Settings of pip as options of `uv pip install`."""
    for name in _SINGLE:
        if name in said:
            yield f"--{name}={said[name]}"
    for name in _LISTS:
        for value in said.get(name, "").split():
            yield f"--{name}={value}"
    if said.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        yield "--no-index"


def uv_command(uv: str, arguments: Sequence[str], said: Mapping[str, str]) -> list[str]:
    """uv's command for the arguments of pip's."""
    return [
        *(uv, "pip", "install", "--quiet", "--python", sys.executable),
        # as pip, the best of all indexes, and not what the first of them happens to have
        "--index-strategy=unsafe-best-match",
        *uv_options(said),
        *arguments,
    ]


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code of who installed."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # beside this interpreter or anywhere else
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    uv = None if os.environ.get("INSTALLER") == "pip" else shutil.which("uv", path=places)
    if uv is not None:
        configured = subprocess.run(
            [*pip, "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        said = pip_settings(configured)
        certificates = {"SSL_CERT_FILE": said["cert"]} if "cert" in said else {}
        done = subprocess.run(
            uv_command(uv, arguments, said), env={**certificates, **os.environ}, check=False
        )
        if done.returncode == 0:
            return 0
        sys.stderr.write(
            f"uv ended with {done.returncode}; pip is asked (INSTALLER=pip: at once)\n"
        )
    return subprocess.run([*pip, "-qq", "install", *arguments], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
