"""`m3-plugin bench kernels --model`: what a layer should take on a chip that is not here.

Times come from `m3_kernels.testing.time_model`, out of the machine code of the kernels as they are:
a change of a kernel shows its expected effect before a GPU has run it, and a run can be held
against what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from m3_plugin.cli.bench.report import short, table_of
from m3_plugin.cli.bench.roofline import PAGE_SIZE, Geometry, Workload, floor_seconds, sparse_work
from m3_plugin.cli.exits import Exit, environment, fail
from m3_plugin.cli.outputs import deliver

if TYPE_CHECKING:
    from m3_kernels.testing.compile_gate import Compiled
    from m3_kernels.testing.time_model import Chip, Work

OPS = ("norm_rope_store", "index_topk", "sparse_attention")
# Of the dtypes of index keys: bytes of a token.
INDEX_BYTES = {"bf16": 256, "int8": 130, "e4m3": 128}
# Blocks that 8 neighbouring rows of a prompt choose together, where published overlaps of
# neighbours hold (docs/gpu-kernels.md).
SHARED_UNION = 20
# Lines of a product in decode and verification on sm_90, those that fill it up included.
LEAST_LINES = 64
# Blocks of a million tokens, the published limit: a server chooses kernels by what it could hold.
MAX_BLOCKS = 8192
# Keys and values of a verified request against those of one row, by the same overlaps.
VERIFY_UNION = 1.3


@dataclass(frozen=True)
class Part:
    """One launch of a layer: which kernel, and what it has to do."""

    name: str
    op: str
    variant: str
    work: Work


@dataclass(frozen=True)
class Modelled:
    """One workload; times in microseconds of a layer, by launch."""

    phase: str
    batch: int
    context: int
    rows: int
    pattern: str
    index: str
    parts: Mapping[str, float]
    total_us: float
    floor_us: float


def model_kernels(
    chip_name: str,
    workloads: Sequence[Workload],
    *,
    record: Path | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """The command with `--model`.

    Raises
    ------
    typer.Exit : nothing can be compiled here
    """
    try:
        from m3_kernels.testing import time_model
    except ImportError as error:
        fail(f"--model compiles the kernels, which needs Triton: {error}", Exit.ENVIRONMENT)
    chip = time_model.CHIPS[chip_name]
    steps = [(workload, index) for workload in workloads for index in INDEX_BYTES]
    parts = [parts_of(workload, index, Geometry(), chip) for workload, index in steps]
    wanted = {(part.op, part.variant) for found in parts for part in found}
    with (
        environment(RuntimeError, OSError),
        Console(stderr=True).status(f"compiling {len(wanted)} kernels for {chip_name}"),
    ):
        figures = figures_of(wanted, chip.arch, record)
    rows = [
        modelled(workload, index, found, figures, chip)
        for (workload, index), found in zip(steps, parts, strict=True)
    ]
    if not as_json:
        print_model(rows, chip, time_model.ERROR, Console())
    body = {
        "chip": asdict(chip),
        "model": True,
        "error": time_model.ERROR,
        "rows": [asdict(row) for row in rows],
    }
    deliver("bench-kernels-model", body, as_json=as_json, output=output)


def figures_of(
    wanted: set[tuple[str, str]], arch: int, record: Path | None
) -> dict[tuple[str, str], Compiled]:
    """Machine code of production variants by op and name; those on record are not compiled.

    Raises
    ------
    OSError : the record cannot be read
    RuntimeError : Triton runs in interpreter mode in this process
    """
    from m3_kernels.testing.compile_gate import Known, compile_variant, op_variants, read_known

    known = read_known(record) if record else Known()
    return {
        (op, variant.name): known.figures.get(known.fingerprint(variant, arch))
        or compile_variant(variant, arch)
        for op in OPS
        for variant in op_variants(op, arch)
        if (op, variant.name) in wanted
    }


def parts_of(workload: Workload, index: str, geometry: Geometry, chip: Chip) -> list[Part]:
    """The launches of a layer's step.

    Parameters
    ----------
    index : dtype of the index keys, a key of INDEX_BYTES
    """
    front = _front(workload, geometry)
    if workload.phase == "prefill":
        return [front, *_prefill(workload, index, geometry, chip)]
    return [front, *_decode(workload, index, geometry, chip)]


def modelled(
    workload: Workload,
    index: str,
    parts: Sequence[Part],
    figures: Mapping[tuple[str, str], Compiled],
    chip: Chip,
) -> Modelled:
    """Times of a layer's launches, and of the least that memory and tensor cores allow."""
    from m3_kernels.testing.time_model import microseconds

    times = {
        part.name: microseconds(chip, figures[part.op, part.variant], part.work) for part in parts
    }
    least = sparse_work(
        workload, Geometry(), bytes_per_value=2, index_token_bytes=INDEX_BYTES[index]
    )
    floor = floor_seconds(
        least, bytes_per_second=chip.memory * 1e6, operations_per_second=chip.throughput * 1e6
    )
    w = workload
    return Modelled(
        *(w.phase, w.batch, w.context, w.rows, w.pattern, index),
        parts=times,
        total_us=sum(times.values()),
        floor_us=floor * 1e6,
    )


def _front(w: Workload, g: Geometry) -> Part:
    """Norm, RoPE and store: heads are read, and written once."""
    from m3_kernels.testing.time_model import Work

    rows = w.batch * w.rows
    heads = g.num_q_heads + 3 * g.num_kv_heads + 1
    work = Work(programs=rows * -(-heads // 16), bytes_moved=rows * heads * g.head_dim * 4)
    return Part("store", "norm_rope_store", "KV bf16 index bf16", work)


def _decode(w: Workload, index: str, g: Geometry, chip: Chip) -> list[Part]:
    from m3_kernels.testing.time_model import Work

    blocks = w.batch * w.blocks
    programs = min(2 * chip.multiprocessors, blocks)
    length = "1" if w.rows == 1 else "8"
    lines = max(16, w.rows * g.num_kv_heads)
    scores = Work(
        programs=programs,
        turns=math.ceil(blocks / programs),
        operations=2 * PAGE_SIZE * g.index_dim * lines,
        bytes_moved=w.batch * w.context * INDEX_BYTES[index],
    )
    name, choice = _choice(w, g, "decode", chip.arch)
    # programs of a request and KV head take two blocks of each row; two keys' worth of tiles each
    segments = -(-min(g.topk, w.blocks) // 2)
    union = VERIFY_UNION if w.pattern == "shared" else min(w.rows, max(1, w.blocks / g.topk))
    rows = 1 if w.rows == 1 else min(4, w.rows)
    groups = -(-w.rows // rows)
    lines = max(LEAST_LINES, g.num_q_heads // g.num_kv_heads * rows)
    attention = Work(
        programs=w.batch * groups * g.num_kv_heads * segments,
        turns=math.ceil(2 * min(union, rows)) * (PAGE_SIZE // 64),
        operations=4 * 64 * g.head_dim * lines,
        # all parts of a row in one turn
        fold_turns=rows if segments > 1 else 0,
        bytes_moved=int(_chosen_bytes(w, g) * union),
    )
    return [
        Part("scores", "index_topk", f"decode scores {index} q_len {length}", scores),
        Part("choice", "index_topk", name, choice),
        Part("attention", "sparse_attention", f"decode q_len {rows} bf16 KV bf16", attention),
    ]


def _prefill(w: Workload, index: str, g: Geometry, chip: Chip) -> list[Part]:
    from m3_kernels.testing.time_model import Work

    lines = 128
    rows = w.batch * w.rows
    visible = (w.context - w.rows / 2) / PAGE_SIZE
    tiles = -(-rows // (lines // g.num_kv_heads))
    shares = max(1, 2 * chip.multiprocessors // tiles)
    key_bytes = INDEX_BYTES[index]
    scores = Work(
        programs=tiles * shares,
        turns=visible / shares,
        operations=2 * PAGE_SIZE * g.index_dim * lines,
        bytes_moved=w.batch * w.context * key_bytes,
        l2_bytes=int(tiles * visible * PAGE_SIZE * key_bytes),
    )
    name, choice = _choice(w, g, "prefill", chip.arch)
    independent = w.blocks * (1 - (1 - min(1, g.topk / w.blocks)) ** 8)
    union = min(w.blocks, SHARED_UNION if w.pattern == "shared" else independent)
    group = g.num_q_heads // g.num_kv_heads
    work = Work(
        programs=-(-rows // 8) * g.num_kv_heads,
        turns=union * (PAGE_SIZE // 64),
        operations=4 * 64 * g.head_dim * 8 * group,
        bytes_moved=w.batch * w.context * 2 * g.num_kv_heads * g.head_dim * 2,
        l2_bytes=int(-(-rows // 8) * g.num_kv_heads * union * PAGE_SIZE * g.head_dim * 4),
    )
    return [
        Part("scores", "index_topk", f"prefill scores {index}", scores),
        Part("choice", "index_topk", name, choice),
        Part("attention", "sparse_attention", "prefill bf16 KV bf16", work),
    ]


def _choice(w: Workload, g: Geometry, phase: str, arch: int) -> tuple[str, Work]:
    """The variant and work of the choice: rounds until the best are found, chunk by chunk.

    In the first chunk every round finds one of the best; in chunk n, in random order, one of n. The
    kernel is that of a server whose longest context is the model's, whatever this context is. In
    decode nothing hides that a chunk is waited for; in prefill other programs do.
    """
    from m3_kernels.testing.time_model import Work
    from m3_kernels.tuning import kernel_config

    config = kernel_config("index_topk_select", arch=arch, max_blocks=MAX_BLOCKS, kind=phase)
    chunks = -(-w.blocks // config["BLOCKS"])
    rounds = sum(g.topk / (chunk + 1) for chunk in range(chunks)) if w.blocks > g.topk else 0
    name = f"{phase} choice up to {MAX_BLOCKS} blocks"
    programs = w.batch * w.rows * g.num_kv_heads
    awaited = chunks - 1 if phase == "decode" else 0
    return name, Work(programs, rounds, awaited=awaited, bytes_moved=programs * w.blocks * 8)


def _chosen_bytes(w: Workload, g: Geometry) -> int:
    """Keys and values of one row's blocks, of all requests."""
    return w.batch * min(w.context, g.topk * PAGE_SIZE) * 2 * g.num_kv_heads * g.head_dim * 2


def print_model(rows: Sequence[Modelled], chip: Chip, error: float, console: Console) -> None:
    """The table, and what it is."""
    names = ("store", "scores", "choice", "attention")
    table = table_of(
        f"microseconds of a sparse layer on {chip.name}, bf16: a model, not a measurement",
        left=("workload", "keys"),
        right=(*names, "total", "floor", "of floor"),
    )
    for row in rows:
        workload = Workload(row.phase, row.batch, row.context, row.rows, row.pattern)
        cells = (
            *(short(row.parts[name]) for name in names),
            *(short(row.total_us), short(row.floor_us), f"{row.floor_us / row.total_us:.0%}"),
        )
        table.add_row(workload.label, row.index, *cells)
    console.print(table)
    console.print(f"Out of machine code for sm_{chip.arch} and bytes; off by up to {error:.0%}.")
