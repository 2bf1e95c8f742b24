"""Draw `dashboard.json` as a picture: its own queries, answered by a Prometheus.

    python deploy/draw_dashboard.py --prometheus http://localhost:9090 --output dashboard.png

Needs matplotlib; Grafana is not needed. A panel without an answer says "no data".
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DASHBOARD = Path(__file__).with_name("dashboard.json")
COLUMNS = 3


@dataclass(frozen=True)
class Line:
    """One series of a panel: seconds before the end of the picture, and values."""

    label: str
    seconds: Sequence[float]
    values: Sequence[float]


def answers(
    prometheus: str, target: Mapping[str, str], *, job: str, start: float, end: float, step: float
) -> list[Line]:
    """What Prometheus says to one query of the dashboard."""
    query = {
        "query": target["expr"].replace("$job", job),
        "start": f"{start:.3f}",
        "end": f"{end:.3f}",
        "step": f"{step:g}",
    }
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(query)}"
    # the shell's proxy is for the outside world
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as reply:
        found = json.load(reply)["data"]["result"]
    return [
        Line(
            label=legend(target["legendFormat"], series["metric"]),
            seconds=[float(when) - end for when, _ in series["values"]],
            values=[float(value) for _, value in series["values"]],
        )
        for series in found
    ]


def legend(form: str, labels: Mapping[str, str]) -> str:
    """Grafana's `{{label}}` replaced by the label's value."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), form)


def draw(
    panels: Sequence[tuple[str, str, Sequence[Line]]],
    output: Path,
    *,
    caption: str,
    with_values: bool = True,
) -> None:
    """One small picture per (title, unit, lines), in the dashboard's order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, unit, lines) in zip(axes.flat, panels, strict=False):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        for line in lines:
            axis.plot(line.seconds, line.values, marker=".", markersize=2, label=line.label)
        if lines:
            axis.set_ylim(bottom=0)
            axis.set_ylabel(unit.replace("percentunit", "share").replace("short", ""), fontsize=7)
            axis.legend(fontsize=6)
            if not with_values:
                axis.set_yticks([])
        else:
            axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes, color="gray")
    figure.supxlabel(f"seconds before the end; {caption}", fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=90)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw dashboard.json from a Prometheus.")
    parser.add_argument("--prometheus", default="http://localhost:9090", help="its address")
    parser.add_argument("--job", default="minimax-m3", help="the job that scrapes the servers")
    parser.add_argument("--minutes", type=float, default=60, help="how far to look back")
    parser.add_argument("--caption", default="", help="what to say about the run")
    parser.add_argument("--until", type=float, help="end, in Unix seconds; default: now")
    parser.add_argument("--no-values", action="store_true", help="shapes only, as an example")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a .png")
    given = parser.parse_args()
    end = time.time() if given.until is None else given.until
    window = {"start": end - 60 * given.minutes, "end": end, "step": max(given.minutes / 4, 1)}
    panels = [
        (
            panel["title"],
            panel["fieldConfig"]["defaults"]["unit"],
            [
                line
                for target in panel["targets"]
                for line in answers(given.prometheus, target, job=given.job, **window)
            ],
        )
        for panel in json.loads(DASHBOARD.read_text())["panels"]
    ]
    draw(panels, given.output, caption=given.caption, with_values=not given.no_values)


if __name__ == "__main__":
    main()
