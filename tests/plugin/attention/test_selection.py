"""Recorded selections: what is sampled, what the sums mean, and the needle in the picture."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.recorder import FILE_PATTERN, SelectionRecorder
from m3_plugin.cli import app
from m3_plugin.cli.blocks_summary import NoRecords, Spread, summarise
from m3_plugin.model.config import MSAConfig
from tests.console import in_one_line
from tests.plugin.attention.released import released_session
from tests.plugin.cli.schemas import checked

RULES = MSAConfig(
    num_index_heads=2,
    index_dim=128,
    block_size=128,
    topk_blocks=3,
    num_init_blocks=0,
    num_local_blocks=1,
)
PAGES = 16


def step(*requests: tuple[int, int], first_page: int = 0) -> MSABatch:
    """Requests of (cached tokens, new rows), each with pages of its own."""
    q_lens = torch.tensor([rows for _, rows in requests])
    starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
    starts[1:] = q_lens.cumsum(0)
    table = torch.arange(len(requests) * PAGES, dtype=torch.int32).view(-1, PAGES) + first_page
    return MSABatch(
        cu_seqlens_q=starts,
        seq_lens=torch.tensor([cached + rows for cached, rows in requests], dtype=torch.int32),
        page_table=table,
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        max_query_len=int(q_lens.max()),
        max_seq_len=PAGES * 128,
    )


def ids(*groups: list[list[int]]) -> torch.Tensor:
    return torch.tensor(groups, dtype=torch.int32)


def records(folder: Path) -> list[dict]:
    (file,) = folder.glob(FILE_PATTERN)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_layers_of_a_step_share_their_rows(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    batch = step((1000, 1), (500, 2))
    chosen = ids([[0, 3, 7], [0, 1, 3], [1, 2, 3]], [[5, 6, 7], [2, 3, -1], [0, 2, 3]])
    recorder.add(chosen, batch=batch)
    recorder.add(chosen, batch=batch)
    recorder.add(chosen, batch=step((1001, 1), (502, 2)))
    header, first, second, third = records(tmp_path)
    assert (header["topk"], header["block_size"]) == (3, 128)
    # position, page of the own block, rows of the request in the step
    assert first["rows"] == [[1000, 7, 1], [500, PAGES + 3, 2], [501, PAGES + 3, 2]]
    assert first["ids"][1] == [[5, 6, 7], [2, 3], [0, 2, 3]]
    assert [(r["step"], r["layer"]) for r in (first, second, third)] == [(0, 0), (0, 1), (1, 0)]
    assert "rows" not in second
    assert third["rows"][0][0] == 1001


def test_long_steps_are_sampled_in_whole_tiles(tmp_path: Path) -> None:
    """Tiles as the kernel for prefill cuts them: at positions, not at rows of the step."""
    recorder = SelectionRecorder(tmp_path, RULES, rows_per_step=24)
    rows = 995
    recorder.add(torch.zeros(2, rows, 3, dtype=torch.int32), batch=step((1003, rows)))
    positions = [row[0] for row in records(tmp_path)[1]["rows"]]
    assert len(positions) <= 24
    # the first tile is cut by the chunk, the last one by the end of the prompt
    assert positions[:5] == [*range(1003, 1008)]
    assert positions[-6:] == [*range(1992, 1998)]
    (middle,) = {position // 8 for position in positions[5:-6]}
    assert positions[5:-6] == [*range(8 * middle, 8 * middle + 8)]


def test_rows_of_decode_are_tiles_of_one(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES, rows_per_step=16)
    batch = step(*[(500, 1)] * 40, (8, 16))
    recorder.add(torch.zeros(2, 56, 3, dtype=torch.int32), batch=batch)
    rows = records(tmp_path)[1]["rows"]
    whole = [row for row in rows if row[2] == 16]
    assert len(rows) == 16
    assert [row[0] for row in whole] == [*range(16, 24)]
    assert len({page for _, page, query_len in rows if query_len == 1}) == 8


def test_room_for_no_tile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 8, the rows of a tile; got 7"):
        SelectionRecorder(tmp_path, RULES, rows_per_step=7)


def test_padding_rows_and_empty_steps_are_left_out(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    recorder.add(torch.zeros(2, 4, 3, dtype=torch.int32), batch=step((600, 0)))
    assert list(tmp_path.glob(FILE_PATTERN)) == []
    recorder.add(torch.zeros(2, 4, 3, dtype=torch.int32), batch=step((600, 1)))
    assert len(records(tmp_path)[1]["rows"]) == 1


def test_sums(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    # own block 4 of 5 visible; the next token of the same request keeps two of three blocks
    recorder.add(ids([[0, 2, 4]], [[1, 2, 4]]), batch=step((512, 1)))
    recorder.add(ids([[0, 1, 4]], [[1, 2, 4]]), batch=step((513, 1)))
    # another request at the next position is no neighbour
    recorder.add(ids([[1, 3, 4]], [[1, 2, 4]]), batch=step((514, 1), first_page=100))
    # within the budget everything is chosen, which says nothing
    recorder.add(ids([[0, 1, 2]], [[0, 1, 2]]), batch=step((300, 1)))
    summary = summarise(tmp_path)
    assert (summary.rows, summary.rows_beyond_budget, summary.num_blocks) == (4, 3, 5)
    (layer,) = summary.layers
    assert layer.heat[0] == [0.6667, 0.6667, 0.3333, 0.3333, 1.0]
    assert layer.heat[1] == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert layer.local == pytest.approx(6 / 18)
    assert layer.early == pytest.approx(2 / 18)
    assert layer.neighbour_overlap == pytest.approx((2 / 3 + 1) / 2)
    assert layer.head_overlap == pytest.approx(2 / 3)


def test_rows_with_a_gap_between_them_are_no_neighbours(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    for position in (600, 602):
        recorder.add(ids([[0, 1, 4]], [[0, 1, 4]]), batch=step((position, 1)))
    assert summarise(tmp_path).layers[0].neighbour_overlap is None


def tile(*choices: str) -> list[list[int]]:
    """Rows that chose three blocks each, e.g. "014"."""
    return [[int(block) for block in choice] for choice in choices]


# Of one tile in block 4 of 0 to 4.
AGREEING = tile(*["014"] * 8)  # union 3, halves 3 and 3
APART = tile(*["014"] * 4, *["234"] * 4)  # union 5, halves 3 and 3
ROAMING = tile("014", "024", "034", "014", "124", "124", "124", "124")  # union 5, halves 5 and 3


def test_unions_of_tiles(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    batch = step((516, 20))
    cut = tile(*["014"] * 4)
    # positions 516 to 519 fill no tile
    recorder.add(ids(cut + AGREEING + APART, cut + ROAMING + AGREEING), batch=batch)
    recorder.add(ids(cut + APART + APART, cut + APART + APART), batch=batch)
    summary = summarise(tmp_path, phase="prefill")
    first, second = (layer.prefill_tiles for layer in summary.layers)
    assert first is not None
    assert second is not None
    # in the order of groups and tiles: unions 3, 5, 5, 3; S 2, 6/5, 8/5, 2
    assert first.tiles == 4
    assert first.union == Spread(4.0, 3.0, 4.0, 5.0)
    assert first.split.mean == pytest.approx((2 + 1.2 + 1.6 + 2) / 4)
    assert (first.split.lower, first.split.median) == pytest.approx((1.5, 1.8))
    assert first.split.upper == pytest.approx(2.0)
    assert first.split_of_sums == pytest.approx((6 + 6 + 8 + 6) / (3 + 5 + 5 + 3))
    assert second.union == Spread(5.0, 5.0, 5.0, 5.0)
    assert second.split_of_sums == pytest.approx(1.2)
    of_all = summary.prefill_tiles
    assert of_all is not None
    assert of_all.tiles == 8
    assert of_all.union.mean == pytest.approx(4.5)
    assert of_all.split_of_sums == pytest.approx((26 + 24) / (16 + 20))


def test_a_half_is_the_first_four_rows(tmp_path: Path) -> None:
    """The fourth row alone differs: only a cut after it makes halves of 5 and 3 blocks."""
    chosen = tile("014", "014", "014", "234", "014", "014", "014", "014")
    SelectionRecorder(tmp_path, RULES).add(
        ids(tile("014") + chosen, tile("014") + chosen), batch=step((519, 9))
    )
    tiles = summarise(tmp_path).prefill_tiles
    assert tiles is not None
    assert tiles.split == Spread(1.6, 1.6, 1.6, 1.6)


def test_rows_that_only_look_like_a_tile_are_none(tmp_path: Path) -> None:
    """Decode and verify are no prefill; neither are two steps, two requests, or a cut tile."""
    recorder = SelectionRecorder(tmp_path, RULES)
    chosen = ids(AGREEING, APART)
    for row in range(8):
        recorder.add(chosen[:, row : row + 1], batch=step((520 + row, 1)))
    recorder.add(chosen, batch=step((520, 8)))
    # chunks of one prompt, the second of which goes on within the tile
    more = torch.cat([chosen, chosen[:, :4]], dim=1)
    recorder.add(more, batch=step((512, 12)))
    recorder.add(more, batch=step((524, 12)))
    unions = summarise(tmp_path).prefill_tiles
    assert unions is not None
    # of the first chunk 512 to 519, of the second 528 to 535; each in both groups
    assert unions.tiles == 4
    recorder = SelectionRecorder(tmp_path / "two", RULES)
    # the second begins where the first ends: 528 to 535 is in neither
    requests = step((516, 16), (532, 12))
    recorder.add(torch.cat([more, more, more], dim=1)[:, :28], batch=requests)
    unions = summarise(tmp_path / "two").prefill_tiles
    assert unions is not None
    assert unions.tiles == 4


def test_tiles_within_the_budget_say_nothing(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    everything = tile(*["012"] * 16)
    beyond = tile(*["013"] * 4, *["123"] * 4)
    recorder.add(ids(everything + beyond, everything + beyond), batch=step((368, 24)))
    unions = summarise(tmp_path).prefill_tiles
    assert unions is not None
    assert unions.tiles == 2
    assert unions.union.mean == 4.0


def test_unions_of_ranks_are_of_their_groups(tmp_path: Path) -> None:
    batch = step((519, 9))
    for chosen in (AGREEING, APART):
        SelectionRecorder(tmp_path, RULES).add(ids(tile("014") + chosen), batch=batch)
    unions = summarise(tmp_path).prefill_tiles
    assert unions is not None
    assert unions.tiles == 2
    assert unions.union.mean == 4.0


def test_phases_are_told_apart(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    recorder.add(ids([[0, 1, 4], [0, 1, 4]], [[0, 1, 4], [0, 1, 4]]), batch=step((600, 2)))
    recorder.add(ids([[2, 3, 4]], [[2, 3, 4]]), batch=step((602, 1)))
    prefill, decode = (summarise(tmp_path, phase=p).layers[0] for p in ("prefill", "decode"))
    assert prefill.heat[0] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert decode.heat[0] == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_ranks_stand_side_by_side(tmp_path: Path) -> None:
    batch = step((600, 1))
    for chosen in ([0, 1, 4], [2, 3, 4]):
        SelectionRecorder(tmp_path, RULES).add(ids([chosen]), batch=batch)
    (layer,) = summarise(tmp_path).layers
    assert [row.index(1.0) for row in layer.heat] == [0, 2]
    SelectionRecorder(tmp_path, RULES).add(ids([[0, 1, 4]]), batch=step((700, 1)))
    with pytest.raises(ValueError, match="one recording per folder"):
        summarise(tmp_path)


def test_a_line_cut_by_a_signal_is_left_out(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    recorder.add(ids([[0, 1, 4]], [[0, 1, 4]]), batch=step((600, 1)))
    (file,) = tmp_path.glob(FILE_PATTERN)
    with file.open("a") as stream:
        stream.write('{"step": 1, "layer": 0, "ro')
    assert summarise(tmp_path).rows == 1


def test_nothing_recorded_says_how(tmp_path: Path) -> None:
    with pytest.raises(NoRecords, match="M3_PLUGIN_RECORD_BLOCKS"):
        summarise(tmp_path)
    SelectionRecorder(tmp_path, RULES).add(ids([[0, 1, 2]], [[0, 1, 2]]), batch=step((300, 1)))
    with pytest.raises(NoRecords, match="none beyond 384 tokens"):
        summarise(tmp_path)
    result = CliRunner().invoke(app, ["blocks", str(tmp_path)])
    assert result.exit_code == 3
    assert "longer prompt" in result.output


@pytest.mark.parametrize("text", ["", "no json\n", "3\n", '{"topk": 4}\n', "\x00\n"])
def test_files_that_are_no_recording_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "selection-1.jsonl").write_text(text)
    result = CliRunner().invoke(app, ["blocks", str(tmp_path)])
    assert result.exit_code == 3
    said = in_one_line(result.output)
    assert "selection-1.jsonl does not begin with a recording's header" in said


def test_recording_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = released_session()
    assert silent.recorder is None
    monkeypatch.setenv("M3_PLUGIN_RECORD_BLOCKS", str(tmp_path / "new"))
    recording = released_session()
    assert recording.recorder is not None
    assert recording.recorder.folder == tmp_path / "new"


def test_picture_and_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recorder = SelectionRecorder(tmp_path, RULES)
    for position in (600, 601):
        batch = step((position, 1))
        recorder.add(ids([[0, 1, 4]], [[2, 3, 4]]), batch=batch)
        recorder.add(ids([[1, 2, 4]], [[2, 3, 4]]), batch=batch)
    picture = tmp_path / "blocks.png"
    numbers = tmp_path / "blocks.json"
    result = CliRunner().invoke(
        app, ["blocks", str(tmp_path), "--plot", str(picture), "--output", str(numbers)]
    )
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 1000
    told = checked("blocks", numbers.read_text())
    assert told["layers"][1]["heat"][0][1] == 1.0
    assert told["prefill_tiles"] is None
    assert "neighbouring rows" not in result.output


def test_table_and_numbers_of_tiles(tmp_path: Path) -> None:
    recorder = SelectionRecorder(tmp_path, RULES)
    recorder.add(ids(AGREEING + APART, ROAMING + AGREEING), batch=step((512, 16)))
    numbers = tmp_path / "blocks.json"
    result = CliRunner().invoke(app, ["blocks", str(tmp_path), "--output", str(numbers)])
    assert result.exit_code == 0, result.output
    assert "tiles of 8 neighbouring rows" in result.output
    (row,) = [line for line in result.output.splitlines() if line.startswith("│          all")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["all", "4", "4.0", "3.0, 4.0, 5.0", "1.70", "1.50, 1.80, 2.00", "1.62"]
    told = checked("blocks", numbers.read_text())["prefill_tiles"]
    assert told["split"]["median"] == pytest.approx(1.8)
    assert told["split_of_sums"] == 26 / 16


def test_a_recording_is_its_owners_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        recorder = SelectionRecorder(tmp_path / "new", RULES)
        recorder.add(ids([[0, 1, 4]], [[2, 3, 4]]), batch=step((600, 1)))
    finally:
        os.umask(umask)
    (file,) = (tmp_path / "new").iterdir()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_no_file_is_written_over_and_no_link_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a restart with the same process id, or where somebody knew the name."""
    monkeypatch.setattr("m3_plugin.attention.recorder._numbers", itertools.repeat(0))
    for _ in range(2):
        SelectionRecorder(tmp_path, RULES).add(ids([[0, 1, 4]]), batch=step((600, 1)))
    assert len(list(tmp_path.glob(FILE_PATTERN))) == 2
    monkeypatch.setattr("m3_plugin.attention.recorder.secrets.token_hex", lambda size: "known")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"selection-{os.getpid()}-0-known.jsonl").symlink_to(victim)
    SelectionRecorder(tmp_path, RULES).add(ids([[0, 1, 4]]), batch=step((600, 1)))
    assert victim.read_text() == "mine"
    assert "no longer recorded" in caplog.text


def test_a_recording_ends_at_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = SelectionRecorder(tmp_path, RULES, max_bytes=1000)
    for position in range(600, 700):
        recorder.add(ids([[0, 1, 4]], [[2, 3, 4]]), batch=step((position, 1)))
    (file,) = tmp_path.glob(FILE_PATTERN)
    assert 800 < file.stat().st_size <= 1000
    assert file.read_bytes().endswith(b"\n")
    assert caplog.text.count("no longer recorded: its file has reached 1,000 bytes") == 1
    assert summarise(tmp_path, phase="decode").rows > 5


def test_a_full_disk_ends_the_recording_and_not_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode: opened("/dev/full", os.O_WRONLY))
    recorder = SelectionRecorder(tmp_path, RULES)
    for position in (600, 601):
        recorder.add(ids([[0, 1, 4]], [[2, 3, 4]]), batch=step((position, 1)))
    assert caplog.text.count("no longer recorded") == 1
    assert os.strerror(errno.ENOSPC) in caplog.text
