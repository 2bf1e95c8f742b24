"""The plugin's counters in the host's own `/metrics`: both hosts collect prometheus_client.

Workers are processes of their own, so the host must run prometheus_client in its multi-process
mode: SGLang does under `--enable-metrics`, vLLM when `PROMETHEUS_MULTIPROC_DIR` names an empty
folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from m3_plugin.session import MSAStatistics

if TYPE_CHECKING:
    from prometheus_client import Counter
    from torch import Tensor

    from m3_plugin.batch import MSABatch

PHASES = ("prefill", "decode")


@cache
def _counters() -> dict[str, Counter]:
    # prometheus_client comes with both hosts and is not needed without one
    from prometheus_client import Counter

    described = {
        "rows": "Query rows served sparse, times MSA layers",
        "blocks_read": "Key blocks attended, summed over query rows, groups and MSA layers",
        "blocks_visible": "Key blocks dense attention would have read, summed alike",
    }
    return {
        name: Counter(f"m3_plugin:msa_{name}", text, labelnames=["phase"])
        for name, text in described.items()
    }


@dataclass
class ExportedStatistics(MSAStatistics):
    """`MSAStatistics` that also feeds `m3_plugin:msa_*_total{phase="prefill" | "decode"}`."""

    def add(self, block_ids: Tensor, *, batch: MSABatch, block_size: int) -> None:
        """Count one layer's selection; arguments as in `MSAStatistics.add`."""
        before = {phase: self.phase(phase) for phase in PHASES}
        super().add(block_ids, batch=batch, block_size=block_size)
        for phase, old in before.items():
            for name, value in self.phase(phase).items():
                _counters()[name].labels(phase=phase).inc(value - old[name])
