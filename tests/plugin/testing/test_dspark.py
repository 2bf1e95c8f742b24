"""M3.1's draft model beside a tiny checkpoint: as published, counted, no part of the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3_plugin.checkpoint.headers import read_checkpoint, read_draft
from m3_plugin.checkpoint.names import is_draft_tensor
from m3_plugin.cli import app
from m3_plugin.diagnosis.findings import Report
from m3_plugin.diagnosis.model import examine_model
from m3_plugin.testing.dspark import add_dspark
from m3_plugin.testing.hub_layout import prepare_folder
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from tests.plugin.cli.schemas import checked


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m31") / "plain"
    write_random_checkpoint(folder, preset=M31_PRESETS["engine"])
    add_dspark(folder)
    return folder


def test_it_has_the_published_names_and_dtypes(checkpoint: Path) -> None:
    headers = read_draft(checkpoint)
    assert len(headers) == 97
    assert {header.dtype for header in headers} == {"BF16", "F8_E4M3", "U8"}
    assert all(is_draft_tensor(header.name) for header in headers)
    shapes = {header.name.rpartition("dspark.")[2]: header.shape for header in headers}
    hidden = shapes["final_norm.weight"][0]
    assert shapes["fc.weight"] == (hidden, 5 * hidden)
    scales = shapes["layers.4.decoder_layer.self_attn.q_proj.weight_scale_inv"]
    assert scales == (shapes["layers.4.decoder_layer.self_attn.q_proj.weight"][0], hidden // 32)
    config = json.loads((checkpoint / "dspark" / "config.json").read_text())
    assert config["architectures"] == ["DSparkMiniMaxDraftModel"]


def test_it_is_no_part_of_the_target(checkpoint: Path) -> None:
    names = {header.name for header in read_checkpoint(checkpoint)}
    assert names.isdisjoint(header.name for header in read_draft(checkpoint))
    assert not any(map(is_draft_tensor, names))


def test_doctor_says_how_large_it_is(checkpoint: Path) -> None:
    report = Report()
    examine_model(report, str(checkpoint))
    total = sum(header.num_bytes for header in read_draft(checkpoint))
    (found,) = [f.value for f in report.findings if f.name == "draft model"]
    assert found.startswith(f"97 tensors, {total:,} bytes in dspark/")
    assert "not served and not read" in found
    assert not [f for f in report.findings if f.status == "failure"]


def test_fit_says_how_large_it_is(checkpoint: Path) -> None:
    for model, size in (
        (str(checkpoint), sum(header.num_bytes for header in read_draft(checkpoint))),
        ("MiniMaxAI/MiniMax-M3.1-Flash", 2_301_867_426),
        ("MiniMaxAI/MiniMax-M3", 0),
    ):
        arguments = ["fit", "--model", model, "--gpu", "H200", "--tp", "4"]
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert checked("fit", result.stdout)["draft_bytes"] == size, model
        shown = CliRunner().invoke(app, arguments).stdout
        assert ("in dspark/, not served and not loaded" in shown) is (size > 0)


def test_a_broken_draft_stops_nobody(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m31", preset=M31_PRESETS["engine"])
    (add_dspark(folder) / "model-dspark-00001.safetensors").write_bytes(b"cut")
    report = Report()
    examine_model(report, str(folder))
    (found,) = [f for f in report.findings if f.name == "draft model"]
    assert found.status == "note"
    assert "cannot be read and is not served anyway" in found.value
    result = CliRunner().invoke(app, ["fit", "--model", str(folder), "--gpu", "H200", "--json"])
    assert checked("fit", result.stdout)["draft_bytes"] == 0


def test_what_was_written_here_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m31", preset=M31_PRESETS["small"])
    draft = add_dspark(folder)
    (draft / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="also holds dspark, which m3-plugin did not write"):
        prepare_folder(folder, force=True)
    assert (draft / "notes.txt").read_text() == "mine"
    (draft / "notes.txt").unlink()
    prepare_folder(folder, force=True)
    assert [file.name for file in folder.iterdir()] == [".m3-plugin-checkpoint"]
