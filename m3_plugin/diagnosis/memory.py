"""Is there room for weights and a cache here? `fit`'s arithmetic on the devices that were seen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3_plugin.diagnosis.findings import Report
from m3_plugin.model.config import M3Config, local_heads
from m3_plugin.model.released import find_model, known_gpus
from m3_plugin.sizing.fit import GIB, RESERVE, UTILIZATION, fit, weight_bytes

SECTION = "model"
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")
# Cards of one name come with different memory.
_SAME_SIZE = 0.05


@dataclass(frozen=True)
class Ranks:
    """The devices of this machine as a server would use them.

    Attributes
    ----------
    options : what tells `m3-plugin fit` the same
    count : ranks: as many of the devices as KV heads can be split over
    memory : bytes of the smallest
    """

    options: str
    count: int
    memory: int


def examine_memory(
    report: Report, name: str, config: M3Config, found: Mapping[str, Any]
) -> Ranks | None:
    """Compare what a checkpoint needs with what was seen.

    Parameters
    ----------
    name, config : the model, as the user gave it, and its configuration
    found : facts of `diagnosis.device`

    Returns
    -------
    Ranks | None : None where nothing is known about the memory
    """
    ranks = ranks_of(config, found)
    if ranks is None:
        return None
    try:
        weights = weight_bytes(config, find_model(name).config, tp_size=ranks.count)
    except ValueError as error:
        report.add(SECTION, "memory", f"cannot be worked out: {error}", status="note")
        return ranks
    room = fit(
        config,
        weights,
        memory=ranks.memory,
        utilization=UTILIZATION,
        reserve=RESERVE,
        tp_size=ranks.count,
        kv_dtype="bf16",
        index_dtype="bf16",
    )
    there = f"{ranks.memory / GIB:.1f} GiB" + (f" on each of {ranks.count}" * (ranks.count > 1))
    needed = f"{weights.per_rank / GIB:.1f} GiB of weights{' per GPU' * (ranks.count > 1)}"
    if room.tokens > 0:
        report.add(
            SECTION,
            "memory",
            f"{needed} in {there}: room for {room.tokens:,} tokens of all requests together "
            "(computed)",
        )
    else:
        report.add(
            SECTION,
            "memory",
            f"too little: {needed} and {RESERVE / GIB:.0f} GiB beside them in "
            f"{UTILIZATION:.0%} of {there} (computed)",
            status="warning",
            advice="a server of this machine alone would end while it loads: m3-plugin fit --model "
            f"{name} --gpu H200 --tp 8 says what another machine has room for",
        )
    return ranks


def ranks_of(config: M3Config, found: Mapping[str, Any]) -> Ranks | None:
    """How a server would spread over the devices that were seen."""
    if found["device_type"] == "cpu":
        memory = main_memory()
        if memory is None:
            return None
        return Ranks(f"--gpu CPU --gpu-memory {memory // GIB} --tp 1", 1, memory)
    gpus = found["gpus"]
    if not gpus:
        return None
    count = max(n for n in range(1, len(gpus) + 1) if _splits(config, n))
    smallest = min(gpus, key=lambda gpu: gpu["gib"])
    options = f"{gpu_option(smallest['name'], smallest['gib'])} --tp {count}"
    return Ranks(options, count, int(smallest["gib"] * GIB))


def _splits(config: M3Config, ranks: int) -> bool:
    try:
        local_heads(config.num_key_value_heads, ranks)
    except ValueError:
        return False
    return config.num_attention_heads % ranks == 0


def gpu_option(name: str, gib: float) -> str:
    """The options of `m3-plugin fit` for a card, of which torch says name and memory."""
    words = set(re.findall(r"\w+", name.upper()))
    matches = [
        gpu
        for gpu in known_gpus().values()
        if set(re.findall(r"\w+", gpu.name.upper())) <= words
        and abs(gib - gpu.memory_mib / 1024) <= _SAME_SIZE * gib
    ]
    if not matches:
        return f'--gpu "{name}" --gpu-memory {gib:g}'
    return f"--gpu {max(matches, key=lambda gpu: len(gpu.name)).name}"


def main_memory() -> int | None:
    """Bytes of main memory that this process may use: the machine's, or its container's limit."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        (total,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    except (OSError, ValueError, IndexError):
        return None
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total
