"""What recorded selections say: where layers look, and how alike neighbours and groups choose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from m3_plugin.selection.recorder import FILE_PATTERN

Phase = Literal["all", "prefill", "decode"]
_HEADER = ("block_size", "topk", "num_local_blocks")


class NoRecords(LookupError):
    """Nothing to sum up; the message says how to record."""


@dataclass(frozen=True)
class Selection:
    """One row of one layer: its position and what each group chose."""

    layer: int
    position: int
    request: tuple[int, int]
    decode: bool
    groups: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class LayerSummary:
    """One sparse layer, over rows that had to leave blocks out.

    Attributes
    ----------
    heat : [group][block], share of the rows that saw a block and chose it
    local, early : share of the chosen blocks that are the newest `num_local_blocks`, or block 0
    neighbour_overlap : share of a row's blocks that the next row of its request chose too
    head_overlap : share of a group's blocks that another group of the row chose too
    """

    layer: int
    rows: int
    heat: list[list[float]]
    local: float
    early: float
    neighbour_overlap: float | None
    head_overlap: float | None


@dataclass(frozen=True)
class Summary:
    """All layers of one recording.

    Attributes
    ----------
    rows : sampled (row, layer) pairs; `rows_beyond_budget` of them had blocks to leave out, and
        only those count below
    workers : processes that recorded; their groups stand side by side, in the order of their files
    """

    block_size: int
    topk: int
    num_blocks: int
    workers: int
    rows: int
    rows_beyond_budget: int
    layers: list[LayerSummary]


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
                for number, (position, page, decode) in enumerate(rows):
                    if self.phase != "all" and bool(decode) != (self.phase == "decode"):
                        continue
                    yield Selection(
                        layer=line["layer"],
                        position=position,
                        request=(line["layer"], page),
                        decode=bool(decode),
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
        yield Selection(first.layer, first.position, first.request, first.decode, groups)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
