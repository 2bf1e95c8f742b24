"""Checkpoint folders that a stranger made: an answer or a reason, soon, and never a traceback."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from m3_plugin.checkpoint.headers import INDEX_FILE, read_checkpoint
from m3_plugin.checkpoint.plan import plan_checkpoint
from m3_plugin.cli.fit import Machine, size
from m3_plugin.diagnosis import Report
from m3_plugin.diagnosis.model import examine_model
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import ModelNotFound, find_model, released_config
from m3_plugin.quantization.dialects import read_quantization
from m3_plugin.quantization.patterns import compiled

SHARD = "model.safetensors"
MACHINE = Machine("H200", memory=140 * 2**30, utilization=0.9, reserve=0, tp_size=8)
Craft = Callable[[Path], None]


def config(edit: Callable[[dict[str, Any]], None] = lambda config: None) -> dict[str, Any]:
    made = json.loads(json.dumps(released_config()))
    edit(made)
    return made


def with_config(edit: Callable[[dict[str, Any]], None]) -> Craft:
    return lambda folder: _write(folder / "config.json", config(edit))


def with_text(**values: Any) -> Craft:
    return with_config(lambda made: made["text_config"].update(values))


def with_quantization(**values: Any) -> Craft:
    return with_config(lambda made: made.update(quantization_config=values))


def with_raw(name: str, content: bytes) -> Craft:
    return lambda folder: void((folder / name).write_bytes(content))


def with_header(header: Any, *, behind: bytes = b"", length: int | None = None) -> Craft:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    return with_raw(SHARD, start + text + behind)


def with_tensor(**entry: Any) -> Craft:
    made = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]} | entry
    return with_header({"w": {k: v for k, v in made.items() if v != "absent"}}, behind=b"\0" * 4)


def with_index(weight_map: Any) -> Craft:
    return lambda folder: _write(folder / INDEX_FILE, {"weight_map": weight_map})


def with_pipe(name: str) -> Craft:
    return lambda folder: os.mkfifo(folder / name)


def with_hole(name: str, start: bytes = b"") -> Craft:
    """A file that says to be 1 TB long and takes no room."""

    def craft(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(2**40)

    return craft


def void(_: object) -> None:
    return None


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


DEEP = b"[" * 100_000 + b"]" * 100_000
CRAFTED: dict[str, Craft] = {
    # headers
    "empty file": with_raw(SHARD, b""),
    "header of a list": with_header([]),
    "header of a number": with_header(b"7"),
    "header that is no JSON": with_header(b"{nonsense"),
    "header that is no text": with_header(b"\xff\xfe\x00{"),
    "deep header": with_header(DEEP),
    "header longer than the file": with_header({}, length=2**63),
    "header of 1 TB with a hole": with_hole(SHARD, struct.pack("<Q", 2**40 - 8)),
    "file with a hole": with_hole(SHARD, struct.pack("<Q", 2) + b"{}"),
    "tensor of a list": with_header({"w": []}),
    "tensor of null": with_header({"w": None}),
    "metadata of a list": with_header({"__metadata__": []}),
    "no offsets": with_tensor(data_offsets="absent"),
    "offsets of strings": with_tensor(data_offsets=["0", "4"]),
    "one offset": with_tensor(data_offsets=[4]),
    "offsets backwards": with_tensor(data_offsets=[4, 0]),
    "offsets below zero": with_tensor(data_offsets=[-4, 4]),
    "offsets that are huge": with_tensor(data_offsets=[0, 10**40]),
    "offsets of floats": with_tensor(data_offsets=[0.0, 4.0]),
    "no shape": with_tensor(shape="absent"),
    "shape of strings": with_tensor(shape=["2"]),
    "shape below zero": with_tensor(shape=[-1, -2]),
    "shape that is huge": with_tensor(shape=[10**30, 10**30]),
    "shape of many lengths": with_tensor(shape=[2**62] * 100_000),
    "shape larger than the bytes": with_tensor(shape=[2**40]),
    "no dtype": with_tensor(dtype="absent"),
    "dtype of a list": with_tensor(dtype=[]),
    "escape in a tensor's name": with_header({"\x1b]0;x\x07\nm3-plugin serving": {}}),
    "half a character in a tensor's name": with_header(b'{"\\ud800": {}}'),
    "long tensor name": with_header({"w" * 10**6: {}}),
    "shard is a pipe": with_pipe(SHARD),
    "shard is a folder": lambda folder: (folder / SHARD).mkdir(),
    "shard links to itself": lambda folder: (folder / SHARD).symlink_to(SHARD),
    "file name with escapes": with_raw("a\x1b[2J\n.safetensors", b""),
    # indices
    "index of a list": with_raw(INDEX_FILE, b"[]"),
    "index without a table": with_raw(INDEX_FILE, b"{}"),
    "index of ints": with_index({"w": 7}),
    "index whose table is a list": with_index([["w", SHARD]]),
    "deep index": with_raw(INDEX_FILE, DEEP),
    "index is a pipe": with_pipe(INDEX_FILE),
    "index with a hole": with_hole(INDEX_FILE),
    "way up": with_index({"w": "../../../../etc/hostname"}),
    "way up to weights": with_index({"w": "../model.safetensors"}),
    "absolute": with_index({"w": "/etc/hostname"}),
    "other kind of file": with_index({"w": "config.json"}),
    "nul": with_index({"w": "a\0.safetensors"}),
    "long file name": with_index({"w": "a" * 5000 + ".safetensors"}),
    "escape in an index": with_index({"\x1b[2J": SHARD}),
    # configs
    "config of a list": with_raw("config.json", b"[]"),
    "config that is no text": with_raw("config.json", b"\xff\xfe"),
    "deep config": with_raw("config.json", b'{"text_config": ' + DEEP + b"}"),
    "nested config": with_text(sparse_attention_config=json.loads("[" * 90 + "]" * 90)),
    "config is a pipe": with_pipe("config.json"),
    "config is a folder": lambda folder: (folder / "config.json").mkdir(),
    "config with a hole": with_hole("config.json"),
    "long number": with_raw("config.json", b'{"hidden_size": ' + b"9" * 10_000 + b"}"),
    "text of a list": with_config(lambda made: made.update(text_config=[1])),
    "absurd experts": with_text(num_local_experts=10**9),
    "many experts": with_text(num_local_experts=20_000),
    "absurd layers": with_text(
        num_hidden_layers=10**9, sparse_attention_config={"use_sparse_attention": False}
    ),
    "absurd MTP modules": with_text(num_mtp_modules=10**9),
    "infinite factor": with_text(partial_rotary_factor=float("inf"), rotary_dim=None),
    "no number": with_text(rope_theta=float("nan")),
    "huge number": with_text(rope_theta=10**400),
    "layer types of lists": with_text(layer_types=[[]] * 60),
    "escape in a key": with_text(**{"num_hiden_layers\x1b[2J\n": 3, "\x1b]0;x\x07": 1}),
    "half a character in a key": with_raw(
        "config.json", json.dumps(config(lambda c: c["text_config"].update({"\ud800": 1}))).encode()
    ),
    "vision of a list": with_config(lambda made: made.update(vision_config=[1])),
    "vision of strings": with_config(lambda made: made.update(vision_config={"hidden_size": "x"})),
    "vision of huge numbers": with_config(
        lambda made: made["vision_config"].update(patch_size=10**1000)
    ),
    # quantisation
    "unknown method with escapes": with_quantization(quant_method="\x1b[2J"),
    "method of a list": with_quantization(quant_method=["mxfp8"]),
    "ignore of ints": with_quantization(quant_method="mxfp8", ignored_layers=[1]),
    "bad expression": with_quantization(quant_method="mxfp8", ignored_layers=["re:(["]),
    "endless expression": with_quantization(
        quant_method="mxfp8", ignored_layers=[r"re:(([a-z_.0-9])+.)+$"]
    ),
    "endless alternatives": with_quantization(
        quant_method="mxfp8", ignored_layers=[r"re:(\w|\w\w|m)*!"]
    ),
    "slow expression": with_quantization(
        quant_method="mxfp8", ignored_layers=["re:" + ".*" * 30 + "!"]
    ),
    "deep expression": with_quantization(
        quant_method="mxfp8", ignored_layers=["re:" + "(" * 5000 + ")" * 5000]
    ),
    "expression in a key": with_quantization(
        quant_method="gptq", bits=4, group_size=128, dynamic={"-:(a+)+\x1b[2J": {}}
    ),
    "expression of auto-round": with_quantization(
        quant_method="auto-round", bits=4, group_size=128, extra_config={"(.*)*x": {"bits": 16}}
    ),
    "groups of lists": with_quantization(quant_method="compressed-tensors", config_groups=[[]]),
    "table of strings": with_quantization(
        quant_method="modelopt", quant_algo="MIXED_PRECISION", quantized_layers={"x\n": "NVFP4"}
    ),
}


def test_there_are_many() -> None:
    assert len(CRAFTED) >= 30


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_folder_is_refused_in_words(tmp_path: Path, name: str) -> None:
    """Through what `doctor` looks at, what `fit` computes from, and what loaders plan from."""
    folder = tmp_path / "crafted"
    folder.mkdir()
    _write(folder / "config.json", config())
    if name.startswith(("config", "deep config")):
        (folder / "config.json").unlink()
    CRAFTED[name](folder)

    report = Report()
    examine_model(report, str(folder))
    assert not report.ok
    said = json.dumps(report.as_dict(), ensure_ascii=False)
    said.encode()
    for finding in report.findings:
        assert all(text.isprintable() for text in (finding.name, finding.value, finding.advice))
        assert len(finding.value) < 5000

    for reason in (load(folder), compute(folder)):
        assert reason is None or reason.isprintable(), reason
    assert load(folder) is not None


def load(folder: Path) -> str | None:
    """What the loaders say of a folder."""
    try:
        source = find_model(str(folder))
        plan_checkpoint(folder, M3Config.from_hf(source.config), fused={}, dequantise=False)
    except (ValueError, ModelNotFound) as error:
        return str(error)
    return None


def compute(folder: Path) -> str | None:
    """What `fit` says of it."""
    try:
        size(str(folder), MACHINE, kv_dtype="bf16", index_dtype="bf16", context=None)
    except (ValueError, ModelNotFound) as error:
        return str(error)
    except typer.Exit as ended:
        # it has said why
        return f"exit {ended.exit_code}"
    return None


def test_nothing_beside_the_folder_is_read(tmp_path: Path) -> None:
    outside = tmp_path / "model.safetensors"
    with_tensor()(tmp_path)
    assert [header.name for header in read_checkpoint(tmp_path)] == ["w"]
    folder = tmp_path / "crafted"
    folder.mkdir()
    for named in ("../model.safetensors", str(outside)):
        with_index({"w": named})(folder)
        with pytest.raises(ValueError, match="safetensors files of its own folder"):
            read_checkpoint(folder)


def test_links_of_a_download_are_followed(tmp_path: Path) -> None:
    """As the Hugging Face cache stores files: blobs elsewhere, with links to them."""
    with_tensor()(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / SHARD).symlink_to(tmp_path / SHARD)
    assert [header.num_bytes for header in read_checkpoint(snapshot)] == [4]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*self_attn.*",
        r"^model\.layers\.\d+\.mlp\..*",
        r".*\.(gate|up|down)_proj$",
        r".*layers\.(\d|1\d)\..*index_[qk]_proj",
        r"(?:model\.)?layers\.\d+\..*experts\.\d+\.w[123]",
    ],
)
def test_published_kinds_of_expressions_pass(pattern: str) -> None:
    assert compiled(pattern).pattern == pattern
    quantization = read_quantization({"quant_method": "mxfp8", "ignored_layers": [f"re:{pattern}"]})
    assert quantization is not None
    assert "unrelated" not in quantization.kept
