"""`m3-plugin tiny`: write a small MiniMax-M3 checkpoint in the published layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m3_plugin.cli.exits import call, environment
from m3_plugin.cli.hosts import require_libraries
from m3_plugin.cli.options import JsonOption, OutputOption
from m3_plugin.cli.outputs import deliver


class Kind(StrEnum):
    """Which weights to write."""

    constructed = "constructed"
    random = "random"


class Model(StrEnum):
    """Whose layout to write."""

    m3 = "m3"
    m3_1 = "m3.1"


class Preset(StrEnum):
    """Sizes of a random checkpoint."""

    small = "small"
    kernel = "kernel"
    engine = "engine"


class Quant(StrEnum):
    """Published ways to quantise MiniMax-M3."""

    mxfp8 = "mxfp8"
    mxfp8_nvfp4 = "mxfp8-nvfp4"
    nvfp4 = "nvfp4"
    mxfp4 = "mxfp4"
    w4a16 = "w4a16"
    awq = "awq"
    gptq = "gptq"
    auto_round = "auto-round"
    fp8 = "fp8"


class Dtype(StrEnum):
    """Data type of the stored tensors."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def tiny(
    folder: Annotated[Path, typer.Argument(help="Folder to write, created if it is not there.")],
    kind: Annotated[
        Kind,
        typer.Option(help="constructed: its answers are known; random: to compare numbers with."),
    ] = Kind.constructed,
    model: Annotated[
        Model,
        typer.Option(
            help="m3.1: sparse attention in every layer, a draft model beside it, and stored as "
            "published unless --dtype is given."
        ),
    ] = Model.m3,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Default: bfloat16 for constructed, float32 for random."),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option(help="Of a constructed one: blocks a token may read. Default: 4."),
    ] = None,
    init: Annotated[
        int | None,
        typer.Option(help="First blocks that are always read, within --topk. Default: 0."),
    ] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="Of a random one: its sizes. Default: engine.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a random one: seed. Default: 0.")] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Without sparse layers, with the same weights.")
    ] = False,
    quant: Annotated[
        Quant | None, typer.Option(help="Quantised as published checkpoints of this kind are.")
    ] = None,
    gguf: Annotated[
        bool,
        typer.Option(
            "--gguf",
            help="Also as model.gguf, for llama.cpp and other engines; needs the library gguf.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint that is in the folder.")
    ] = False,
    as_json: JsonOption = False,
    output: OutputOption = None,
) -> None:
    """Write a tiny MiniMax-M3 checkpoint, which loads wherever the published one does."""
    _refuse_foreign_options(kind, topk=topk, preset=preset, seed=seed)
    if gguf:
        _refuse_in_gguf(model=model, init=init, dense=dense, quant=quant)
    with (
        environment(LookupError, OSError),
        # what is in the way is named, and so is --force
        call("", FileExistsError, NotADirectoryError, ValueError),
    ):
        require_libraries("safetensors", "tokenizers", "transformers")
        from m3_plugin.testing.dspark import add_dspark
        from m3_plugin.testing.gguf_file import require_gguf, write_gguf

        if gguf:
            require_gguf()

        with Console(stderr=True).status(Text(f"writing {folder}")):
            layout = _Layout(model, first_blocks=init or 0, dense=dense)
            if model is Model.m3_1 and dtype is None:
                quant, dtype = quant or Quant.mxfp8_nvfp4, Dtype.bfloat16
            if kind is Kind.constructed:
                summary = _constructed(folder, layout, dtype=dtype, topk=topk, force=force)
            else:
                summary = _random(
                    folder, layout, dtype=dtype, preset=preset, seed=seed, force=force
                )
            if quant is not None:
                summary |= _quantise(folder, quant)
            if gguf:
                write_gguf(folder)
            if model is Model.m3_1:
                add_dspark(folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            summary["bytes"] = sum(file.stat().st_size for file in files)
            summary["files"] = [str(file.relative_to(folder)) for file in files]
    if not as_json:
        _report(summary)
    deliver("tiny", summary, as_json=as_json, output=output)


def _refuse_foreign_options(
    kind: Kind, *, topk: int | None, preset: Preset | None, seed: int | None
) -> None:
    """An option of the other kind would silently do nothing."""
    of_random = {"--preset": preset, "--seed": seed}
    foreign = of_random if kind is Kind.constructed else {"--topk": topk}
    for option, value in foreign.items():
        if value is not None:
            raise typer.BadParameter(f"has no meaning with --kind {kind}", param_hint=option)


def _refuse_in_gguf(*, model: Model, init: int | None, dense: bool, quant: Quant | None) -> None:
    """llama.cpp's architecture has no key for these, so the file would be another model's."""
    reasons = {
        "--model": "layers that are sparse before the experts begin" if model is Model.m3_1 else "",
        "--init": "first blocks that are always read" if init else "",
        "--dense": "sparse layers that are switched off" if dense else "",
        "--quant": f"weights in {quant}" if quant else "",
    }
    for option, what in reasons.items():
        if what:
            raise typer.BadParameter(
                f"--gguf has no words for {what}; leave one of the two options out",
                param_hint=option,
            )


@dataclass(frozen=True)
class _Layout:
    """What both kinds are asked for: whose layout, blocks that are always read, no sparse layer."""

    model: Model
    first_blocks: int
    dense: bool


def _constructed(
    folder: Path, layout: _Layout, *, dtype: Dtype | None, topk: int | None, force: bool
) -> dict[str, Any]:
    import torch

    from m3_plugin.testing.constructed import ConstructedCheckpoint
    from m3_plugin.testing.prompts import min_needle_tokens, needle_prompt

    checkpoint = ConstructedCheckpoint(
        topk_blocks=4 + layout.first_blocks if topk is None else topk,
        num_init_blocks=layout.first_blocks,
        sparse_everywhere=layout.model is Model.m3_1,
        use_sparse_attention=not layout.dense,
    )
    stored = dtype or Dtype.bfloat16
    checkpoint.write(folder, dtype=getattr(torch, stored), force=force)
    # a first block that is forced takes a place
    places = checkpoint.topk_blocks - checkpoint.num_init_blocks
    tokens = max(1536, min_needle_tokens(topk_blocks=places))
    prompt = needle_prompt(0, num_tokens=tokens, topk_blocks=places)
    assert prompt.dense_answer is not None
    answer = prompt.dense_answer if layout.dense else prompt.expected_text
    return _summary(folder, Kind.constructed, stored, checkpoint.shape, layout) | {
        "example": {
            "num_tokens": len(prompt.token_ids),
            "question": prompt.question.strip(),
            "answer": answer.strip(),
            "dense_answer": prompt.dense_answer.strip(),
        }
    }


def _random(
    folder: Path,
    layout: _Layout,
    *,
    dtype: Dtype | None,
    preset: Preset | None,
    seed: int | None,
    force: bool,
) -> dict[str, Any]:
    import torch

    from m3_plugin.testing.random_checkpoint import M31_PRESETS, PRESETS, write_random_checkpoint

    stored = dtype or Dtype.float32
    name = (preset or Preset.engine).value
    seed = 0 if seed is None else seed
    presets = M31_PRESETS if layout.model is Model.m3_1 else PRESETS
    shape = replace(presets[name], num_init_blocks=layout.first_blocks)
    write_random_checkpoint(
        folder,
        preset=shape,
        seed=seed,
        dtype=getattr(torch, stored),
        use_sparse_attention=not layout.dense,
        force=force,
    )
    summary = _summary(folder, Kind.random, stored, shape, layout)
    return summary | {"preset": name, "seed": seed}


def _quantise(folder: Path, quant: Quant) -> dict[str, Any]:
    """Put the quantised checkpoint in the plain one's place; what that adds to the summary."""
    from m3_plugin.testing.quantised import quantise_checkpoint

    with TemporaryDirectory(dir=folder.parent) as scratch:
        plain = folder.rename(Path(scratch) / "plain")
        quantise_checkpoint(plain, folder, quant.value)
    return {"quant": quant.value}


def _summary(folder: Path, kind: Kind, dtype: Dtype, shape: Any, layout: _Layout) -> dict[str, Any]:
    sparse = sum(map(shape.is_sparse, range(shape.num_hidden_layers)))
    return {
        "folder": str(folder),
        "model": layout.model.value,
        "kind": kind.value,
        "dtype": dtype.value,
        "layers": shape.num_hidden_layers,
        "sparse_layers": 0 if layout.dense else sparse,
        "hidden_size": shape.hidden_size,
        "heads": [shape.num_attention_heads, shape.num_key_value_heads],
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "topk_blocks": shape.topk_blocks,
        "init_blocks": shape.num_init_blocks,
        "vocab_size": shape.vocab_size,
    }


def _report(summary: dict[str, Any]) -> None:
    name = f"MiniMax-{summary['model'].upper()}"
    table = Table(title=f"{summary['kind']} {name} checkpoint", show_header=False)
    query_heads, kv_heads = summary["heads"]
    budget = summary["topk_blocks"] * summary["block_size"]
    rows = {
        "folder": summary["folder"],
        "size": f"{summary['bytes'] / 1e6:.1f} MB in {len(summary['files'])} files, "
        f"{summary['dtype']}",
        "layers": f"{summary['layers']}, {summary['sparse_layers']} of them sparse",
        "attention": f"{query_heads} query and {kv_heads} KV heads of {summary['head_dim']}, "
        f"hidden size {summary['hidden_size']}",
        "selection": f"{summary['topk_blocks']} blocks of {summary['block_size']}: "
        f"sparse beyond {budget} tokens"
        + (f"; first blocks always read: {first}" if (first := summary["init_blocks"]) else ""),
    }
    if "quant" in summary:
        rows["quantised"] = f"{summary['quant']}, the rest in {summary['dtype']}"
    if "preset" in summary:
        rows["preset"] = f"{summary['preset']}, seed {summary['seed']}"
    if "example" in summary:
        example = summary["example"]
        rows["example"] = (
            f"needle_prompt(0, num_tokens={example['num_tokens']}) asks "
            f"{example['question']!r}: {example['answer']!r}"
        )
        rows["if dense"] = f"an engine that reads every block says {example['dense_answer']!r}"
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
