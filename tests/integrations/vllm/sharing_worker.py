"""What a test of shared scans asks a worker: vLLM mixes it into its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from m3_vllm.worker import M3WorkerExtension

COUNTS: Counter[str] = Counter()


def counted(name: str, function: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(call: Any) -> None:
        COUNTS[name] += 1
        function(call)

    return run


class SharingWorker(M3WorkerExtension):
    def count_scans(self) -> None:
        """Count from now on."""
        session = self._m3_session()
        session._scan = counted("shared", session._scan)
        session._select = counted("alone", session._select)

    def scans(self) -> dict[str, int]:
        """Scans of a share, and of all blocks, by this worker's layers."""
        return dict(COUNTS)
