"""A worker that dies while it stores: vLLM imports this first, and mixes it into its worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import safetensors.torch

from m3_vllm.worker import M3WorkerExtension

# how many files are whole when the machine fails, in the middle of the next one
FILES = "M3_TEST_FILES_BEFORE_KILL"

_save = safetensors.torch.save_file
_saved = 0


def _save_or_die(tensors: Any, filename: Any, metadata: dict[str, str] | None = None) -> None:
    """The library's own; the file that is one too many ends in its middle, and the process too."""
    global _saved
    _save(tensors, filename, metadata)
    _saved += 1
    if _saved > int(os.environ[FILES]):
        os.truncate(filename, Path(filename).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


if FILES in os.environ:
    safetensors.torch.save_file = _save_or_die


class KilledWorker(M3WorkerExtension):
    pass
