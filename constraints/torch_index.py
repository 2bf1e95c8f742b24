"""Where pip finds the CPU build of torch that a constraints file pins: prints options for pip.

    python constraints/torch_index.py constraints/vllm-0.32.txt

Prints nothing where pip's own configuration finds it, `--extra-index-url URL` where only PyTorch's
index for CPUs has it, and one line on stderr about the choice. `TORCH_INDEX` names another index,
which is then used unasked. Exit code 1, and one sentence, where neither has it.

Runs with the pip of the interpreter that runs it; imports the standard library only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pinned_torch(constraints: str) -> str:
    """The requirement of torch in the text of a constraints file, e.g. "torch==2.13.0+cpu".

    Raises
    ------
    ValueError : the file does not pin torch.
    """
    match = re.search(r"^torch==\S+", constraints, re.MULTILINE)
    if match is None:
        raise ValueError("the constraints pin no release of torch")
    return match.group()


def is_found(requirement: str, *options: str) -> bool:
    """Whether pip, as configured here and with these options, finds a requirement."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run"]
    command += ["--no-deps", "--ignore-installed", "--retries=1", "--quiet", *options, requirement]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main(file: str) -> int:
    """The command; prints options for pip and returns the exit code."""
    torch = pinned_torch(Path(file).read_text(encoding="utf-8"))
    if index := os.environ.get("TORCH_INDEX"):
        sys.stderr.write(f"{torch}: from {index}, as TORCH_INDEX says\n")
    elif is_found(torch):
        return 0
    elif is_found(torch, f"--extra-index-url={PYTORCH_CPU_INDEX}"):
        index = PYTORCH_CPU_INDEX
        sys.stderr.write(f"{torch}: pip's indexes lack it, so it comes from {index}\n")
    else:
        sys.stderr.write(
            f"{torch} is found neither in pip's indexes nor at {PYTORCH_CPU_INDEX}: connect this "
            "machine to one of them, or set TORCH_INDEX to an index that has it\n"
        )
        return 1
    sys.stdout.write(f"--extra-index-url={index}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
