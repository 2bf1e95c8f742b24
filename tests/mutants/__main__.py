"""Puts faults into the code one by one, and demands that a test notices each: `make mutants`.

    python -m tests.mutants                # all of them; exit code 1 if one lives
    python -m tests.mutants --only index   # those whose name holds "index"
    python -m tests.mutants --skip 40      # all but the first 40: goes on where a run was ended
    python -m tests.mutants --list

A mutant that lives is a fault of the tests. One whose text is no longer found is out of date, which
is an error too: give it the text of today.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
ROOTS = (".", "kernels", "integrations/vllm", "integrations/sglang")
# With these faults a loop may not end: a test that takes so long notices it. Tests that take longer
# together have noticed nothing.
TEST_TIMEOUT_S = 600
TIMEOUT_S = 2400


def copy_tree(folder: Path) -> None:
    """The files that git knows, without their history."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, target)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def interpreter(fault: Fault) -> Path:
    """Of the environment that the fault's tests need: SGLang's has one of its own."""
    sglang = any(path.startswith("tests/integrations/sglang/") for path in fault.tests)
    return ROOT / ".venv" / "sglang" / "bin" / "python" if sglang else Path(sys.executable)


def survives(fault: Fault, folder: Path) -> bool:
    """Whether the tests that should notice a fault pass with it in a copy of the tree.

    Raises
    ------
    ValueError : the text that the fault replaces is not there exactly once, or the tests took
        too long together.
    """
    path = folder / fault.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(fault.old) != 1:
        raise ValueError(
            f"{fault.file} holds {fault.old!r} {whole.count(fault.old)} times, not once"
        )
    path.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
    try:
        paths = os.pathsep.join(str((folder / root).resolve()) for root in ROOTS)
        command = [
            str(interpreter(fault)),
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            # from outside, for a loop in C++ hears no signal
            f"--timeout={TEST_TIMEOUT_S}",
            "--timeout-method=thread",
        ]
        if fault.select:
            command += ["-k", fault.select]
        try:
            done = subprocess.run(
                [*command, *fault.tests],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"no end in {TIMEOUT_S} s: {error.stdout!r}"[:500]) from None
        if done.returncode < 0:
            # the process died of it
            return False
        if done.returncode not in (0, 1):
            raise ValueError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
        return done.returncode == 0
    finally:
        path.write_text(whole, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a mutant lives or is out of date."""
    parser = argparse.ArgumentParser(description="Faults that tests must notice, one by one.")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name holds it")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N")
    parser.add_argument("--list", action="store_true", help="name them and put none in")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree at work at once")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if options.only in fault.name][options.skip :]
    if options.list:
        sys.stdout.write("".join(f"{fault.name}: {fault.file}\n" for fault in chosen))
        return 0
    bad = []

    def work(faults: Sequence[Fault]) -> None:
        with tempfile.TemporaryDirectory(prefix="m3-plugin-mutants-") as name:
            copy_tree(Path(name))
            for fault in faults:
                start = time.monotonic()
                try:
                    verdict = "LIVES" if survives(fault, Path(name)) else "killed"
                except ValueError as error:
                    verdict = f"ERROR {error}"
                if verdict != "killed":
                    bad.append(fault.name)
                sys.stdout.write(f"{verdict}  {fault.name}  {time.monotonic() - start:.0f} s\n")
                sys.stdout.flush()

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, [chosen[i :: options.jobs] for i in range(options.jobs)]))
    sys.stdout.write(f"{len(chosen) - len(bad)} of {len(chosen)} mutants killed\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
