"""`m3-plugin blocks`: draw which blocks the sparse layers chose while a server recorded them."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m3_plugin.cli.exits import environment
from m3_plugin.cli.options import JsonOption, OutputOption, PlotOption
from m3_plugin.cli.outputs import deliver

if TYPE_CHECKING:
    from m3_plugin.cli.blocks_summary import LayerSummary, Summary


class Phase(StrEnum):
    """Which rows to sum up."""

    all = "all"
    prefill = "prefill"
    decode = "decode"


def blocks(
    folder: Annotated[
        Path, typer.Argument(help="The folder that M3_PLUGIN_RECORD_BLOCKS named for the server.")
    ],
    phase: Annotated[
        Phase,
        typer.Option(help="prefill: rows of prompts; decode: rows of generated tokens; all: both."),
    ] = Phase.all,
    as_json: JsonOption = False,
    output: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """Show which blocks of the context the sparse layers read while a server recorded them.

    Per layer: how often each block is chosen, how much of the choice is the newest blocks or block
    0, how much of it the next token and the other heads share, and how many blocks neighbouring
    rows of a prompt read together.
    """
    from m3_plugin.cli.blocks_summary import NoRecords, summarise

    with (
        environment(NoRecords, ValueError, OSError),
        Console(stderr=True).status(Text(f"reading {folder}")),
    ):
        summary = summarise(folder, phase=phase.value)
    if not as_json:
        _print(summary, Console())
    deliver("blocks", asdict(summary), as_json=as_json, output=output)
    if plot is not None:
        _plot(summary, plot, title=f"{phase.value} rows" if phase != Phase.all else "all rows")
        Console(stderr=True).print(f"picture: {plot}", markup=False)


def mean_heat(layer: LayerSummary) -> list[float]:
    """Per block, the mean over groups of the share that chose it."""
    return [sum(shares) / len(layer.heat) for shares in zip(*layer.heat, strict=True)]


def _print(summary: Summary, console: Console) -> None:
    console = console if console.is_terminal else Console(width=100)
    beyond, rows = summary.rows_beyond_budget, summary.rows
    table = Table(
        title=f"{beyond:,} sampled rows beyond the budget (of {rows:,}), "
        f"{summary.topk} of up to {summary.num_blocks} blocks each"
    )
    for heading in ("sparse layer", "local", "block 0", "kept by next row", "shared by groups"):
        table.add_column(heading, justify="right")
    table.add_column("most chosen blocks")
    for layer in summary.layers:
        heat = mean_heat(layer)
        top = sorted(range(len(heat)), key=lambda block: -heat[block])[:4]
        table.add_row(
            str(layer.layer),
            f"{layer.local:.0%}",
            f"{layer.early:.0%}",
            _share(layer.neighbour_overlap),
            _share(layer.head_overlap),
            ", ".join(f"{block} ({heat[block]:.0%})" for block in top),
        )
    console.print(table)
    if summary.prefill_tiles is not None:
        console.print(_tiles_table(summary))


def _tiles_table(summary: Summary) -> Table:
    """What decides how many rows a tile of prefill should hold."""
    from m3_kernels.work_plan import TILE_ROWS

    table = Table(
        title=f"tiles of {TILE_ROWS} neighbouring rows of prefill and one group",
        caption=f"U: blocks of a tile's union; S: (U of its first {TILE_ROWS // 2} rows + U of its "
        f"last {TILE_ROWS // 2}) / U",
    )
    for heading in ("sparse layer", "tiles", "U", "quartiles", "S", "quartiles", "sum / sum"):
        table.add_column(heading, justify="right")
    named = [(str(layer.layer), layer.prefill_tiles) for layer in summary.layers]
    for name, tiles in [*named, ("all", summary.prefill_tiles)]:
        if tiles is None:
            continue
        union, split = tiles.union, tiles.split
        table.add_row(
            name,
            f"{tiles.tiles:,}",
            f"{union.mean:.1f}",
            f"{union.lower:.1f}, {union.median:.1f}, {union.upper:.1f}",
            f"{split.mean:.2f}",
            f"{split.lower:.2f}, {split.median:.2f}, {split.upper:.2f}",
            f"{tiles.split_of_sums:.2f}",
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _plot(summary: Summary, path: Path, *, title: str) -> None:
    """One line per layer and group, one column per block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(layer.layer, g, row) for layer in summary.layers for g, row in enumerate(layer.heat)]
    figure, (axis, shares) = plt.subplots(
        1, 2, figsize=(13, max(3.2, 0.16 * len(groups))), width_ratios=[4, 1]
    )
    image = axis.imshow(
        [row for _, _, row in groups], aspect="auto", cmap="magma", vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    per_layer = len(summary.layers[0].heat)
    axis.set_yticks(
        [per_layer * i + (per_layer - 1) / 2 for i in range(len(summary.layers))],
        [str(layer.layer) for layer in summary.layers],
    )
    for i in range(1, len(summary.layers)):
        axis.axhline(per_layer * i - 0.5, color="white", linewidth=0.5)
    axis.set_xlabel(f"block of {summary.block_size} tokens")
    axis.set_ylabel(f"sparse layer, {per_layer} groups each")
    axis.set_title(f"share of rows that chose a block ({title})")
    figure.colorbar(image, ax=axis, label="share of rows")
    at = range(len(summary.layers))
    for name, values in {
        "local": [layer.local for layer in summary.layers],
        "block 0": [layer.early for layer in summary.layers],
        "kept by next row": [layer.neighbour_overlap for layer in summary.layers],
        "shared by groups": [layer.head_overlap for layer in summary.layers],
    }.items():
        known = [(value, i) for value, i in zip(values, at, strict=True) if value is not None]
        shares.plot(*zip(*known, strict=True), "o-", label=name, markersize=3)
    shares.set_ylim(len(summary.layers) - 0.5, -0.5)
    shares.set_xlim(-0.05, 1.05)
    shares.set_yticks(list(at), [str(layer.layer) for layer in summary.layers])
    shares.set_title("share of the chosen blocks")
    shares.set_xlabel("share")
    shares.set_ylabel("sparse layer")
    # beside the lines, which run along both edges
    shares.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
