"""Sessions that report to the host's metrics what their layers read and how long they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
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

    def store(
        self,
        plan: MSAPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        *,
        norms: HeadNorms,
        cos_sin: Tensor,
        caches: MSACaches,
    ) -> tuple[Tensor, Tensor]:
        """As `MSASession.store`; the first layer that stores under a plan counts a step."""
        if plan is not self._last_plan:
            self._last_plan = plan
            self._steps.labels(phase=plan.batch.phase).inc()
        with self._timed("store", plan):
            return super().store(
                plan, q, k, v, index_q, index_k, norms=norms, cos_sin=cos_sin, caches=caches
            )

    def select(self, plan: MSAPlan, index_q: Tensor, *, caches: MSACaches) -> Tensor:
        """As `MSASession.select`."""
        with self._timed("select", plan):
            return super().select(plan, index_q, caches=caches)

    def attend(
        self, plan: MSAPlan, q: Tensor, block_ids: Tensor, *, caches: MSACaches, out: Tensor
    ) -> None:
        """As `MSASession.attend`."""
        with self._timed("attend", plan):
            super().attend(plan, q, block_ids, caches=caches, out=out)

    @contextmanager
    def _timed(self, part: str, plan: MSAPlan) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds.labels(phase=plan.batch.phase, part=part).inc(seconds)
