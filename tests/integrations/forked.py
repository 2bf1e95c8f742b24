"""Processes that have imported a host already: engines, and programs as an interpreter runs them.

Importing a host takes most of an engine's start and nearly all of a short program's time, so it is
done once, in a server from which both are forked: it has imported the host and nothing else, and no
plugin is loaded there. PYTHONPATH and a `sitecustomize` are read as by a new interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, popen_fork
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# read while a host is imported, so that their values need a process from nothing
READ_BY_IMPORTS = ("TRITON_INTERPRET", "PROMETHEUS_MULTIPROC_DIR")


def start(
    target: Callable[..., None],
    *arguments: Any,
    environment: Mapping[str, str],
    preload: Sequence[str],
) -> BaseProcess:
    """Start `target(*arguments)` in a process of its own.

    Parameters
    ----------
    environment : all variables of the new process
    preload : modules of the host that all processes share; those of the first call count
    """
    fresh = any(environment.get(name) != os.environ.get(name) for name in READ_BY_IMPORTS)
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    context.set_forkserver_preload(list(preload))
    if not fresh:
        # what one of its children is given, `sitecustomize` above all, is not for all others
        with only_variables({n: v for n, v in environment.items() if n != "PYTHONPATH"}):
            forkserver.ensure_running()
    with only_variables(environment):
        # not a daemon: engines have children of their own
        process: BaseProcess = context.Process(
            target=_in_environment, args=(dict(environment), target, *arguments)
        )
        process.start()
    return process


@contextmanager
def only_variables(environment: Mapping[str, str]) -> Iterator[None]:
    """These variables and no others, while the context lasts."""
    saved = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _in_environment(
    environment: Mapping[str, str], target: Callable[..., None], *arguments: Any
) -> None:
    # a forked process has the variables with which the server was started
    os.environ.clear()
    os.environ.update(environment)
    folders = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = folders
    customise(folders)
    target(*arguments)


def customise(folders: Sequence[str]) -> None:
    """Import the first `sitecustomize` of these folders, as an interpreter does when it starts."""
    for file in (Path(folder, "sitecustomize.py") for folder in folders):
        spec = importlib.util.spec_from_file_location("sitecustomize", file)
        if file.exists() and spec is not None and spec.loader is not None:
            sys.modules["sitecustomize"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return


def fork_children() -> None:
    """Hosts spawn their workers; those of this process inherit what it has imported instead.

    The servers of the tests are processes of the hosts' own, whose children import and register all
    anew.
    """
    how: Any = SpawnProcess
    how._Popen = staticmethod(popen_fork.Popen)


@dataclass(frozen=True)
class Interpreter:
    """Runs programs as `python` would, in forks of a process that has imported a host.

    Attributes
    ----------
    preload : modules of the host; as for its engines, for one server serves both
    imported_with : variables that the host's imports read, the same for everyone
    """

    preload: tuple[str, ...]
    imported_with: Mapping[str, str]

    def run(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -c CODE ...` or `python -m MODULE ...` to the end, however it ends.

        Parameters
        ----------
        environment : variables beside ours
        """
        words = [str(word) for word in arguments]
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            process = start(
                _program,
                words,
                (str(out), str(err)),
                environment={**self.imported_with, **os.environ, **(environment or {})},
                preload=self.preload,
            )
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
                process.join()
            code = process.exitcode
            assert code is not None
            said = [
                file.read_text(errors="replace") if file.exists() else "" for file in (out, err)
            ]
        return subprocess.CompletedProcess(words, code, *said)

    def interpret(
        self, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The same; the program must end well."""
        done = self.run(*arguments, environment=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def report(
        self,
        module: str,
        *arguments: object,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON that a module writes into the file that is its last argument."""
        target = folder / "report.json"
        self.interpret("-m", module, *arguments, target, environment=environment)
        return json.loads(target.read_text())


def _program(words: list[str], files: tuple[str, str]) -> None:
    """What `python *words` does, its output in files."""
    for number, name in zip((1, 2), files, strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    kind, what, *rest = words
    sys.argv = [kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c", kind
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
