"""What the files under deploy/ and docs/support.md say, for tests of several rooms."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from m3_plugin.host import metrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"

Host = Literal["vllm", "sglang"]
_HOSTS: tuple[Host, Host] = ("vllm", "sglang")


def alerts() -> dict[str, dict[str, Any]]:
    """Rules of alerts.yaml by name."""
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def queries() -> list[str]:
    """What the dashboard asks."""
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def metric_names(text: str, prefix: str) -> set[str]:
    """Names like `vllm:num_preemptions_total` in a text; ones with a wild card are no names."""
    # an image's tag is no name either
    found = set(re.findall(rf"\b{prefix}:[a-z][a-z_0-9]*[a-z0-9]\b(?!\*)", text))
    return {name for name in found if not re.fullmatch(r"v\d+", name.partition(":")[2])}


def sample_name(name: str) -> str:
    """A metric as its source names it: prometheus_client appends what its kind says."""
    return re.sub(r"_(total|bucket|sum|count)$", "", name)


@cache
def plugin_metrics() -> frozenset[str]:
    """Ours, from the functions that make them: each remembers what it made."""
    makers = [maker for maker in vars(metrics).values() if hasattr(maker, "cache_info")]
    made = [maker() for maker in makers]
    several = [list(m.values()) if isinstance(m, dict) else m for m in made]
    flat = [one for some in several for one in (some if isinstance(some, list | tuple) else [some])]
    return frozenset(one._name for one in flat)


def unknown_metrics(host: Host, package: Path) -> set[str]:
    """Metrics of a host that deploy/ or a page names, and no source of the installed host does.

    Parameters
    ----------
    host : prefix of its metrics
    package : folder of the installed host
    """
    files = [*DEPLOY.iterdir(), *(ROOT / "docs").glob("*.md")]
    named = {name for file in files for name in metric_names(_text(file), host)}
    assert len(named) > 5
    sources = " ".join(path.read_text() for path in package.rglob("*.py") if "metric" in str(path))
    defined = {sample_name(name) for name in re.findall(rf'"({host}:\w+)"', sources)}
    return {name for name in named if sample_name(name) not in defined}


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def absent_instances(scraped: Mapping[str, str | None]) -> set[str]:
    """Instances for which the rule M3PluginAbsent is true.

    Parameters
    ----------
    scraped : instance -> its /metrics, None of one that does not answer
    """
    assert alerts()["M3PluginAbsent"]["expr"] == (
        'up{job="minimax-m3"} == 1 unless on (job, instance) m3_plugin:info == 1'
    )
    up = {instance for instance, text in scraped.items() if text is not None}
    present = re.compile(r"^m3_plugin:info\{[^}]*\} 1(\.0)?$", re.MULTILINE)
    return up - {instance for instance in up if present.search(scraped[instance] or "")}


def server_arguments(host: Host) -> list[str]:
    """Of the pod's server, and thereby of compose's."""
    pod, _ = yaml.safe_load_all((DEPLOY / f"pod-{host}.yaml").read_text())
    return pod["spec"]["containers"][0]["args"]


def support_rows() -> list[tuple[str, str, str]]:
    """(feature, vLLM, SGLang) of docs/support.md."""
    lines = (ROOT / "docs" / "support.md").read_text().splitlines()
    rows = [line.strip().strip("|").split(" | ") for line in lines if line.startswith("| ")]
    assert all(len(row) == 3 for row in rows)
    cells = [tuple(cell.strip() for cell in row) for row in rows]
    return [(a, b, c) for a, b, c in cells if b not in ("vLLM", "")]


def support_flags(host: Host) -> set[str]:
    """Options that the page gives to a host.

    In the first column `a; b` are vLLM's and SGLang's; a flag without a partner is of every host
    that has a cell, but for "SGLang's `--x`".
    """
    found: set[str] = set()
    for feature, *cells in support_rows():
        own = cells[_HOSTS.index(host)]
        found |= set(re.findall(r"`(--[a-z][\w-]*)", own))
        if own != "-":
            parts = feature.split("; ")
            part = parts[_HOSTS.index(host)] if len(parts) == 2 else feature
            if host == "vllm":
                part = re.sub(r"SGLang's `[^`]*`", "", part)
            found |= set(re.findall(r"`(--[a-z][\w-]*)", part))
    return found
