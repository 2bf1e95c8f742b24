"""The plugin's metrics in the host's own `/metrics`: both hosts collect prometheus_client.

`m3_plugin:info` is 1 with version, device and kernels as labels; where it is absent, the host's own
MiniMax-M3 serves. `m3_plugin:kernels_refused` is 1 for each better kernel family that cannot run.
`m3_plugin:requests_refused_total` counts requests with parts that MiniMax-M3 cannot take.
`m3_plugin:msa_rows_total` and `msa_blocks_*_total` count what MSA layers read, under
`M3_PLUGIN_STATISTICS=1`; `m3_plugin:msa_seconds_total` how long they took, and
`m3_plugin:msa_steps_total` over how many steps, under `M3_PLUGIN_TIMINGS=1`.

Workers are processes of their own, so the host must run prometheus_client in its multi-process
mode: SGLang does under `--enable-metrics`, vLLM when `PROMETHEUS_MULTIPROC_DIR` names an empty
folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from m3_plugin import __version__
from m3_plugin.session import HeadNorms, MSACaches, MSAPlan, MSASession, MSAStatistics

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge
    from torch import Tensor

    from m3_plugin.backends import KernelChoice
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


@cache
def _presence_gauges() -> tuple[Gauge, Gauge]:
    from prometheus_client import Gauge

    # processes agree; "max" shows them as one sample without a process id
    return (
        Gauge(
            "m3_plugin:info",
            "1 where m3-plugin serves MiniMax-M3",
            labelnames=["version", "device", "kernels"],
            multiprocess_mode="max",
        ),
        Gauge(
            "m3_plugin:kernels_refused",
            "1 for each preferred kernel family that cannot run here",
            labelnames=["kernels", "reason"],
            multiprocess_mode="max",
        ),
    )


@cache
def _refused_requests() -> Counter:
    from prometheus_client import Counter

    return Counter(
        "m3_plugin:requests_refused",
        "Requests with a part that MiniMax-M3 cannot take",
        labelnames=["part"],
    )


@cache
def _timers() -> tuple[Counter, Counter]:
    from prometheus_client import Counter

    return (
        Counter(
            "m3_plugin:msa_seconds",
            "Time spent in MSA layers: norm, RoPE and store; selecting blocks; attending",
            labelnames=["phase", "part"],
        ),
        Counter("m3_plugin:msa_steps", "Steps over which that time was spent", ["phase"]),
    )


def count_refused_request(part: str) -> None:
    """Count a request that is refused for a part of it, e.g. "audio"; call it where that is said.

    As `export_presence`, only in a process that serves.
    """
    try:
        refused = _refused_requests()
    except ImportError:
        return
    refused.labels(part=part).inc()


def export_presence(kernels: KernelChoice, *, device_type: str) -> None:
    """Say in the host's metrics which kernels serve, and which were refused and why.

    prometheus_client decides on import whether processes share their values. So this is called by a
    worker that is about to serve, when the host has set that up, and not by an entry point.
    """
    try:
        info, refused = _presence_gauges()
    except ImportError:
        # both hosts bring the library; without one there is nobody to read it
        return
    info.labels(version=__version__, device=device_type, kernels=kernels.family).set(1)
    for family, reason in kernels.refused:
        refused.labels(kernels=family, reason=reason).set(1)


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


class TimedSession(MSASession):
    """An `MSASession` that says in the host's metrics how long its layers take, for CPUs.

    Feeds `m3_plugin:msa_seconds_total{phase, part="store" | "select" | "attend"}` and, once per
    step, `m3_plugin:msa_steps_total{phase}`. It is wall-clock time around each part: on a GPU that
    would be the time of the launches.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seconds, self._steps = _timers()
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
