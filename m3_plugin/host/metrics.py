"""The plugin's metrics in the host's own `/metrics`: both hosts collect prometheus_client.

`m3_plugin:info` is 1 with version, device and kernels as labels; where it is absent, the host's own
MiniMax-M3 serves. `m3_plugin:kernels_refused` is 1 for each better kernel family that cannot run,
with a code for the reason; the reason itself, which may hold paths, is in the log alone.
`m3_plugin:requests_refused_total` counts requests with parts that MiniMax-M3 cannot take.
`m3_plugin:msa_rows_total` and `msa_blocks_*_total` count what MSA layers read, under
`M3_PLUGIN_STATISTICS=1`; `m3_plugin:msa_seconds_total` how long they took, and
`m3_plugin:msa_steps_total` over how many steps, under `M3_PLUGIN_TIMINGS=1`.
`m3_plugin:dense_rows_total` and `m3_plugin:dense_seconds_total`, under the same variables, are of
dense layers where our kernel serves them.
`m3_plugin:checked_steps_total` counts steps that `M3_PLUGIN_CHECK` looked at.

Workers are processes of their own, so the host must run prometheus_client in its multi-process
mode: SGLang does under `--enable-metrics`, vLLM when `PROMETHEUS_MULTIPROC_DIR` names an empty
folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from m3_plugin import __version__

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge


logger = logging.getLogger(__name__)

# Words of a reason -> its code, the first that is found. `/metrics` asks nobody for a password, and
# every new value of a label is a new time series.
_REFUSALS = {
    "ROCm": "rocm",
    "computes on CPU tensors only": "device",
    "no C++ compiler": "no_compiler",
    "is no command": "no_compiler",
    "do not compile": "build_failed",
    "compiler took over": "build_failed",
    "--version failed": "build_failed",
    "does not start": "build_failed",
    "cannot be built or kept": "cache",
    "another process held": "cache",
    "do not load": "not_loadable",
    "not installed": "not_installed",
    "its test failed": "self_test",
    "TRITON_INTERPRET": "interpreter",
}
OTHER_REFUSAL = "unsupported"
REFUSAL_CODES = frozenset({*_REFUSALS.values(), OTHER_REFUSAL})


def refusal_code(reason: str) -> str:
    """One of `REFUSAL_CODES` for why a kernel family cannot run."""
    return next((code for words, code in _REFUSALS.items() if words in reason), OTHER_REFUSAL)


@cache
def read_counters() -> dict[str, Counter]:
    """What MSA layers read: rows, blocks read, blocks visible; labelled by phase."""
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
def layer_timers() -> tuple[Counter, Counter]:
    """Seconds of MSA layers by phase and part, and the steps over which they were spent."""
    from prometheus_client import Counter

    return (
        Counter(
            "m3_plugin:msa_seconds",
            "Time spent in MSA layers: norm, RoPE and store; selecting blocks; attending",
            labelnames=["phase", "part"],
        ),
        Counter("m3_plugin:msa_steps", "Steps over which that time was spent", ["phase"]),
    )


@cache
def dense_counters() -> dict[str, Counter]:
    """Rows and seconds of dense layers on our kernel, labelled by phase."""
    from prometheus_client import Counter

    described = {
        "rows": "Query rows of dense layers on m3-plugin's kernel, times those layers",
        "seconds": "Time spent attending in these layers",
    }
    return {
        name: Counter(f"m3_plugin:dense_{name}", text, labelnames=["phase"])
        for name, text in described.items()
    }


@cache
def _checked_steps() -> Counter:
    from prometheus_client import Counter

    return Counter(
        "m3_plugin:checked_steps",
        "Steps whose pages, choices and results were looked at",
    )


def count_checked_step() -> None:
    """Count a step that was checked, in a process that serves."""
    try:
        checked = _checked_steps()
    except ImportError:
        return
    checked.inc()


def count_refused_request(part: str) -> None:
    """Count a request that is refused for a part of it, e.g. "audio"; call it where that is said.

    As `export_presence`, only in a process that serves.
    """
    try:
        refused = _refused_requests()
    except ImportError:
        return
    refused.labels(part=part).inc()


def export_presence(kernels: str, *, refused: Iterable[tuple[str, str]], device_type: str) -> None:
    """Say in the host's metrics which kernels serve, and which were refused and why.

    Parameters
    ----------
    kernels : name of the family that serves
    refused : (name, reason) of each preferred family that cannot run here
    device_type : "cpu" or "cuda"

    prometheus_client decides on import whether processes share their values. So this is called by a
    worker that is about to serve, when the host has set that up, and not by an entry point.
    """
    try:
        info, refusals = _presence_gauges()
    except ImportError:
        # both hosts bring the library; without one there is nobody to read it
        return
    info.labels(version=__version__, device=device_type, kernels=kernels).set(1)
    for family, reason in refused:
        logger.warning("m3-plugin: kernels %s are refused: %s", family, reason)
        refusals.labels(kernels=family, reason=refusal_code(reason)).set(1)
