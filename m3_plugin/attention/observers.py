"""Sessions that report to the host's metrics what their layers read and how long they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m3_plugin.attention.session import MSAPlan, MSASession, MSAStatistics
from m3_plugin.host.metrics import layer_timers, read_counters

if TYPE_CHECKING:
    from torch import Tensor

    from m3_plugin.attention.batch import MSABatch

PHASES = ("prefill", "decode")


@dataclass
class ExportedStatistics(MSAStatistics):
    """`MSAStatistics` that also feeds `m3_plugin:msa_*_total{phase="prefill" | "decode"}`."""

    def add(self, block_ids: Tensor, *, batch: MSABatch, block_size: int) -> None:
        """Count one layer's selection; arguments as in `MSAStatistics.add`."""
        before = {phase: self.phase(phase) for phase in PHASES}
        super().add(block_ids, batch=batch, block_size=block_size)
        for phase, old in before.items():
            for name, value in self.phase(phase).items():
                read_counters()[name].labels(phase=phase).inc(value - old[name])


class TimedSession(MSASession):
    """An `MSASession` that says in the host's metrics how long its layers take, for CPUs.

    Feeds `m3_plugin:msa_seconds_total{phase, part="store" | "select" | "attend"}` and, once per
    step, `m3_plugin:msa_steps_total{phase}`. It is wall-clock time around each part: on a GPU that
    would be the time of the launches.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seconds, self._steps = layer_timers()
        self._last_plan: MSAPlan | None = None

    @contextmanager
    def timed(self, part: str, plan: MSAPlan) -> Iterator[None]:
        """Adds the time within to the metric; the first part under a plan counts a step."""
        if plan is not self._last_plan:
            self._last_plan = plan
            self._steps.labels(phase=plan.batch.phase).inc()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds.labels(phase=plan.batch.phase, part=part).inc(seconds)
