"""One visit to a machine with a GPU: everything that waits for one, in at most eight minutes.

    make gpu-run                                         # PYTHON names another interpreter
    PYTHONPATH=.:kernels python -P -m m3_plugin.testing.gpu_run OUT

The machine needs torch, its Triton, typer and rich, and no network. Steps run in the order of what
would be missed most, each with a limit of its own. What a step prints goes to a file while it runs,
and `summary.json` is written anew after each, so a visit that is cut off loses nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from m3_plugin.host.children import child_environment, python

SECONDS = 480
ROOT = Path(__file__).parents[2]
PYTHON = tuple(python())
CLI = (*PYTHON, "-m", "m3_plugin.cli")
# A start of torch and Triton is not worth less.
LEAST_SECONDS = 10


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes
    ----------
    limit : seconds after which it is ended, with all that it started
    modules : what must be importable for it
    missing : why it cannot run here, "" if it can
    """

    name: str
    command: tuple[str, ...]
    limit: int
    modules: tuple[str, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "right", "wrong" (its exit code is not 0), "cut off" or "left out"."""

    name: str
    state: str
    seconds: float = 0.0
    code: int | None = None
    reason: str = ""


def steps(folder: Path) -> list[Step]:
    """In their order; together at most SECONDS."""
    sanitizer = find_sanitizer()
    small = ("check", "--device", "cuda", "--family", "triton", "--repeats", "0")
    none = "" if sanitizer else "no compute-sanitizer (wheel nvidia-cuda-sanitizer-api)"

    def check(only: str, limit: int) -> Step:
        output = str(folder / f"check-{only}.json")
        command = (*CLI, "check", "--device", "cuda", "--only", only, "--output", output)
        return Step(f"check-{only}", command, limit)

    def bench(name: str, decode: str, verify: str, prefill: str, limit: int) -> Step:
        options = ("--decode", decode, "--verify", verify, "--prefill", prefill)
        output = str(folder / f"bench-{name}.json")
        command = (*CLI, "bench", "kernels", *options, "--output", output)
        return Step(f"bench-{name}", command, limit)

    def sanitized(tool: str, only: str, limit: int) -> Step:
        command = (sanitizer or "", "--tool", tool, *CLI, *small, "--only", only)
        return Step(f"sanitizer-{tool}", command, limit, missing=none)

    return [
        check("mixed", 80),
        bench("decode", "1x8192,1x131072,64x8192,64x131072", "", "", 80),
        bench("verify", "", "64x131072", "", 50),
        bench("prefill", "", "", "8192,131072", 60),
        check("long", 60),
        sanitized("memcheck", "verify", 50),
        sanitized("racecheck", "verify", 50),
        Step(
            "model",
            (*PYTHON, "-m", "pytest", "-q", "-m", "", "-k", "on_a_gpu", MODEL_TEST),
            50,
            modules=("pytest", "transformers"),
        ),
    ]


MODEL_TEST = "tests/plugin/attention/test_session_in_a_model.py"


def find_sanitizer() -> str | None:
    """The sanitizer of the CUDA toolkit, or of its wheel."""
    found = shutil.which("compute-sanitizer")
    places = [Path(place) / "nvidia" for place in sys.path]
    inside = (match for place in places for match in place.glob("**/compute-sanitizer"))
    return found or next((str(match) for match in inside if match.is_file()), None)


def visit(
    wanted: Sequence[Step], folder: Path, *, seconds: float, device: str | None = None
) -> list[Outcome]:
    """Run the steps one after the other, writing what becomes of them.

    Parameters
    ----------
    folder : where each step's output and summary.json go
    seconds : for all of them
    device : name of the GPU, for the summary
    """
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in wanted:
        outcomes.append(_run(step, folder, left=end - time.monotonic()))
        last = outcomes[-1]
        _write(folder, outcomes, device=device)
        sys.stdout.write(f"{last.name}: {last.state} {last.seconds:.0f} s {last.reason}\n")
        sys.stdout.flush()
    return outcomes


def _run(step: Step, folder: Path, *, left: float) -> Outcome:
    absent = [name for name in step.modules if importlib.util.find_spec(name) is None]
    if step.missing or absent:
        reason = step.missing or f"not installed: {', '.join(absent)}"
        return Outcome(step.name, "left out", reason=reason)
    if left < LEAST_SECONDS:
        return Outcome(step.name, "left out", reason="no time was left")
    begin, limit = time.monotonic(), min(step.limit, left)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with (folder / f"{step.name}.txt").open("w") as printed:
        child = subprocess.Popen(
            step.command,
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=child_environment({"PYTHONPATH": path}),
            start_new_session=True,
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return Outcome(step.name, "cut off", limit, reason=f"after {limit:.0f} s")
    state = "right" if code == 0 else "wrong"
    return Outcome(step.name, state, time.monotonic() - begin, code)


def _write(folder: Path, outcomes: Sequence[Outcome], *, device: str | None) -> None:
    body = {"device": device, "steps": [asdict(outcome) for outcome in outcomes]}
    (folder / "summary.json").write_text(json.dumps(body, indent=1) + "\n")


def _device() -> str | None:
    """The GPU's name; None where torch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a step was wrong, 0 also where there is no GPU and nothing ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="where results are written")
    folder: Path = parser.parse_args(arguments).folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = _device()
    if device is None:
        _write(folder, [], device=None)
        sys.stdout.write("no CUDA device that torch can see: nothing was run\n")
        return 0
    outcomes = visit(steps(folder), folder, seconds=SECONDS, device=device)
    return int(any(outcome.state == "wrong" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
