"""What recorded selections say: where layers look, and how alike neighbours and groups choose.

Of tiles of prefill it measures what decides how many rows one should hold (docs/gpu-kernels.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, Literal

from m3_kernels.work_plan import DECODE_ROWS, TILE_ROWS
from m3_plugin.attention.recorder import FILE_PATTERN

Phase = Literal["all", "prefill", "decode"]
_HEADER = ("block_size", "topk", "num_local_blocks")


class NoRecords(LookupError):
    """Nothing to sum up; the message says how to record."""


@dataclass(frozen=True)
class Selection:
    """One row of one layer: its position and what each group chose.

    Attributes
    ----------
    request : equal for rows of one request as long as they are in one block
    query_len : rows of its request in this step
    """

    layer: int
    step: int
    position: int
    request: tuple[int, int]
    query_len: int
    groups: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Spread:
    """Mean and quartiles of a quantity."""

    mean: float
    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class TileSummary:
    """Tiles of prefill: `TILE_ROWS` neighbouring rows of a request and one group.

    Attributes
    ----------
    tiles : how many, all rows beyond the budget and in one step
    union : blocks that any row of a tile chose: what a program that takes the tile reads
    split : blocks that two programs of half the tile read, over `union`: 1 if the halves share
        nothing, 2 if they agree
    split_of_sums : the same of all tiles together, in which large unions weigh more: the sum of the
        halves' unions over the sum of the unions
    """

    tiles: int
    union: Spread
    split: Spread
    split_of_sums: float


@dataclass(frozen=True)
class LayerSummary:
    """One sparse layer, over rows that had to leave blocks out.

    Attributes
    ----------
    heat : [group][block], share of the rows that saw a block and chose it
    local, early : share of the chosen blocks that are the newest `num_local_blocks`, or block 0
    neighbour_overlap : share of a row's blocks that the next row of its request chose too
    head_overlap : share of a group's blocks that another group of the row chose too
    prefill_tiles : None if no whole tile of prefill rows was recorded
    """

    layer: int
    rows: int
    heat: list[list[float]]
    local: float
    early: float
    neighbour_overlap: float | None
    head_overlap: float | None
    prefill_tiles: TileSummary | None


@dataclass(frozen=True)
class Summary:
    """All layers of one recording.

    Attributes
    ----------
    rows : sampled (row, layer) pairs; `rows_beyond_budget` of them had blocks to leave out, and
        only those count below
    workers : processes that recorded; their groups stand side by side, in the order of their files
    prefill_tiles : those of all layers
    """

    block_size: int
    topk: int
    num_blocks: int
    workers: int
    rows: int
    rows_beyond_budget: int
    layers: list[LayerSummary]
    prefill_tiles: TileSummary | None


@dataclass
class _Tiles:
    """Unions of the whole tiles of prefill of one layer, while its rows come in their order."""

    # of a tile, and of its first and its second half together
    whole: list[int] = field(default_factory=list)
    halves: list[int] = field(default_factory=list)
    rows: list[Selection] = field(default_factory=list)

    def add(self, selection: Selection) -> None:
        if self.rows and not _in_one_tile(self.rows[-1], selection):
            self.rows.clear()
        if selection.query_len > DECODE_ROWS:
            self.rows.append(selection)
        if len(self.rows) < TILE_ROWS:
            return
        for chosen in zip(*(row.groups for row in self.rows), strict=True):
            first = frozenset().union(*chosen[: TILE_ROWS // 2])
            second = frozenset().union(*chosen[TILE_ROWS // 2 :])
            self.whole.append(len(first | second))
            self.halves.append(len(first) + len(second))
        self.rows.clear()


def _in_one_tile(first: Selection, second: Selection) -> bool:
    """Whether a row is the next one of a tile, which begins at a multiple of its rows."""
    return (
        (first.step, first.request) == (second.step, second.request)
        and first.position + 1 == second.position
        and second.position % TILE_ROWS != 0
    )


def _tile_summary(layers: list[_Tiles]) -> TileSummary | None:
    whole = [union for tiles in layers for union in tiles.whole]
    halves = [unions for tiles in layers for unions in tiles.halves]
    if not whole:
        return None
    return TileSummary(
        tiles=len(whole),
        union=_spread(whole),
        split=_spread([parts / union for parts, union in zip(halves, whole, strict=True)]),
        split_of_sums=sum(halves) / sum(whole),
    )


def _spread(values: Sequence[float]) -> Spread:
    # one value has no quartiles but itself
    lower, median, upper = quantiles([*values, *values][: max(2, len(values))], method="inclusive")
    return Spread(mean(values), lower, median, upper)


@dataclass
class _Layer:
    """Sums of one layer while files are read."""

    rows: int = 0
    seen: list[int] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)
    blocks: int = 0
    local: int = 0
    early: int = 0
    neighbours: list[float] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)
    # last selection of each request, for its neighbour
    last: dict[tuple[int, int], Selection] = field(default_factory=dict)
    tiles: _Tiles = field(default_factory=_Tiles)

    def add(self, selection: Selection, *, block_size: int, num_local: int) -> None:
        own = selection.position // block_size
        self.rows += 1
        self.seen += [0] * (own + 1 - len(self.seen))
        for block in range(own + 1):
            self.seen[block] += 1
        while len(self.chosen) < len(selection.groups):
            self.chosen.append([])
        for counts, blocks in zip(self.chosen, selection.groups, strict=True):
            counts += [0] * (own + 1 - len(counts))
            for block in blocks:
                counts[block] += 1
            self.blocks += len(blocks)
            self.local += sum(block > own - num_local for block in blocks)
            self.early += 0 in blocks
        for first, second in combinations(selection.groups, 2):
            self.heads.append(len(first & second) / len(first))
        before = self.last.get(selection.request)
        if before is not None and before.position + 1 == selection.position:
            pairs = zip(before.groups, selection.groups, strict=True)
            self.neighbours += [len(old & new) / len(old) for old, new in pairs]
        self.last[selection.request] = selection
        self.tiles.add(selection)

    def summary(self, layer: int, *, num_blocks: int) -> LayerSummary:
        seen = self.seen + [0] * (num_blocks - len(self.seen))
        heat = [
            [
                round(count / times, 4) if times else 0.0
                for count, times in zip(
                    counts + [0] * (num_blocks - len(counts)), seen, strict=True
                )
            ]
            for counts in self.chosen
        ]
        return LayerSummary(
            layer=layer,
            rows=self.rows,
            heat=heat,
            local=self.local / self.blocks,
            early=self.early / self.blocks,
            neighbour_overlap=_mean(self.neighbours),
            head_overlap=_mean(self.heads),
            prefill_tiles=_tile_summary([self.tiles]),
        )


def summarise(folder: Path, *, phase: Phase = "all") -> Summary:
    """Read all recordings in a folder.

    Parameters
    ----------
    phase : "decode" for rows that were alone in their step, "prefill" for the others

    Raises
    ------
    NoRecords : no file, or no row beyond the budget; says what to do.
    ValueError : files of different models in one folder, or files that are no recording.
    """
    files = sorted(folder.glob(FILE_PATTERN))
    if not files:
        raise NoRecords(
            f"{folder} holds no {FILE_PATTERN}; start the server with "
            f"M3_PLUGIN_RECORD_BLOCKS={folder} and send it requests"
        )
    rules = _rules(files)
    layers: dict[int, _Layer] = {}
    workers = [_Worker(file, phase) for file in files]
    rows = beyond = 0
    for selection in _side_by_side(workers):
        rows += 1
        if selection.position // rules["block_size"] + 1 <= rules["topk"]:
            continue
        beyond += 1
        layers.setdefault(selection.layer, _Layer()).add(
            selection, block_size=rules["block_size"], num_local=rules["num_local_blocks"]
        )
    if not beyond:
        budget = rules["topk"] * rules["block_size"]
        raise NoRecords(
            f"{rows} rows of phase {phase!r} in {folder}, none beyond {budget:,} tokens, up to "
            "which every block is chosen; send a longer prompt"
        )
    num_blocks = max(len(layer.seen) for layer in layers.values())
    return Summary(
        block_size=rules["block_size"],
        topk=rules["topk"],
        num_blocks=num_blocks,
        workers=len(workers),
        rows=rows,
        rows_beyond_budget=beyond,
        layers=[layers[i].summary(i, num_blocks=num_blocks) for i in sorted(layers)],
        prefill_tiles=_tile_summary([layer.tiles for layer in layers.values()]),
    )


def _header(file: Path) -> dict[str, Any]:
    """The first line: the rules by which the blocks in the others were chosen."""
    try:
        with file.open() as lines:
            header = json.loads(lines.readline())
    except ValueError as error:
        raise ValueError(f"{file} does not begin with a recording's header: {error}") from None
    if not isinstance(header, dict) or not header.keys() >= set(_HEADER):
        raise ValueError(
            f"{file} does not begin with a recording's header, which has {', '.join(_HEADER)}; "
            "remove it, or record again"
        )
    return header


def _rules(files: list[Path]) -> dict[str, Any]:
    found = {file: _header(file) for file in files}
    first = found[files[0]]
    for file, rules in found.items():
        if rules != first:
            raise ValueError(
                f"{file.name} and {files[0].name} were recorded from different models; keep one "
                "recording per folder"
            )
    return first


@dataclass(frozen=True)
class _Worker:
    file: Path
    phase: Phase

    def __iter__(self) -> Iterator[Selection]:
        rows: list[list[int]] = []
        with self.file.open() as lines:
            lines.readline()
            for text in lines:
                if not text.endswith("\n"):
                    # the server was ended while it wrote
                    return
                line = json.loads(text)
                rows = line.get("rows", rows)
                for number, (position, page, query_len) in enumerate(rows):
                    if self.phase != "all" and (query_len == 1) != (self.phase == "decode"):
                        continue
                    yield Selection(
                        layer=line["layer"],
                        step=line["step"],
                        position=position,
                        request=(line["layer"], page),
                        query_len=query_len,
                        groups=tuple(frozenset(group[number]) for group in line["ids"]),
                    )


def _side_by_side(workers: list[_Worker]) -> Iterator[Selection]:
    """Rows of all workers; of tensor parallel ranks, which see the same rows, the groups joined."""
    if len(workers) == 1:
        yield from workers[0]
        return
    for parts in zip(*workers, strict=False):
        first = parts[0]
        same = all((p.layer, p.position) == (first.layer, first.position) for p in parts)
        if not same:
            raise ValueError(
                "the files of this folder do not hold the same rows: they are not the ranks of one "
                "tensor parallel server; keep one recording per folder"
            )
        groups = tuple(group for part in parts for group in part.groups)
        yield replace(first, groups=groups)


def _mean(values: list[float]) -> float | None:
    return mean(values) if values else None
