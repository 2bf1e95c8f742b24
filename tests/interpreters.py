"""Programs and interpreters of their own, for what lasts as long as a process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a script prints before an answer in JSON, so that a host's own lines do not count.
MARK = "ANSWER "

# Imports what takes long, then forks for every line of its input: a script, variables, two files.
FORKING = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
print("READY", flush=True)
for line in sys.stdin:
    script, variables, out, err = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(variables)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        exec(script, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


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


@contextmanager
def forking(*modules: str) -> Iterator[Forking]:
    """An interpreter that has imported modules, while the context lasts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "imports").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", FORKING, *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            yield Forking(process, folder)
        finally:
            process.communicate()


@dataclass(frozen=True)
class Forking:
    """An interpreter that has imported modules already: each script runs in a child of it.

    For what a program does after imports that take seconds. Variables that are read during these
    imports, and a `sitecustomize`, need an interpreter of their own.

    Attributes
    ----------
    process : runs `FORKING`
    folder : for what its children print; `imports` holds the errors of its imports
    """

    process: subprocess.Popen[str]
    folder: Path

    def run(
        self, script: str, *, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, however it ends."""
        out, err = (self.folder / name for name in ("out", "err"))
        for file in (out, err):
            file.unlink(missing_ok=True)
        request = json.dumps([script, dict(environment or {}), str(out), str(err)])
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        code = self._answer()
        return subprocess.CompletedProcess(script, code, out.read_text(), err.read_text())

    def report(self, module: str, *arguments: object) -> Any:
        """The JSON that ends what a module's `main` prints; logs may stand before it."""
        words = [str(word) for word in arguments]
        done = self.run(f"from {module} import main\nmain(*{words!r})")
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    def _answer(self) -> int:
        """The exit status of the last child; what imports print stands before the first."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().lstrip("-").isdigit():
                return int(line)
        raise RuntimeError(f"imports failed: {(self.folder / 'imports').read_text()[-4000:]}")
