"""A folder as a stranger may have made it: its modules tell when one of them runs."""

from __future__ import annotations

from pathlib import Path

# Of what our children import early: third parties, hosts, and one of the standard library.
MODULES = (
    *("triton", "packaging", "torch", "typer", "rich", "transformers", "numpy", "openai", "httpx"),
    *("vllm", "sglang", "prometheus_client", "_m3_planted", "graphlib"),
)
_MODULE = """
import pathlib, sys
with pathlib.Path({witness!r}).open("a") as file:
    file.write({name!r} + " in " + " ".join(sys.orig_argv) + "\\n")
raise SystemExit("a module of the current folder runs")
"""


def plant(folder: Path, *, witness: Path) -> None:
    """Write a module of every name into the folder; each that runs says so in `witness`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        source = _MODULE.format(witness=str(witness), name=name)
        (folder / f"{name}.py").write_text(source)


def ran(witness: Path) -> list[str]:
    """Which of them ran, and in which process."""
    return witness.read_text().splitlines() if witness.exists() else []
