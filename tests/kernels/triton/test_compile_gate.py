"""Every Triton kernel compiles for every chip at its chosen configuration, within its budget."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_kernels.launch import Launch
from m3_kernels.testing.compile_gate import (
    ARCHS,
    OPS,
    SHARED_LIMIT,
    Compiled,
    Variant,
    dependency,
    faults,
    op_variants,
    syntax,
)

# Releases beside the environment's own; `make test` puts them there.
ENVIRONMENTS = Path(__file__).parents[3] / ".venv"
RESULTS = Path(__file__).parents[3] / "docs" / "results"


def gate(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles: without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        given = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *([given] if given else [])])
    return subprocess.run(
        [sys.executable, "-m", "m3_kernels.testing.compile_gate", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )


RELEASES = [
    pytest.param("", id="triton"),
    *(
        pytest.param(
            release,
            id=f"triton-{release}",
            marks=pytest.mark.skipif(
                not (ENVIRONMENTS / f"triton-{release}").exists(),
                reason=f"no .venv/triton-{release}: run make test",
            ),
        )
        # of torch 2.11, 2.12 and 2.13 (GPU builds of vLLM 0.31 and 0.32), 2.14 (vLLM 0.33, SGLang)
        for release in ("3.6", "3.7", "3.8")
    ),
]


def figures(release: str) -> Path:
    """What `make kernels-table` wrote about a release of Triton; "" is the environment's."""
    return RESULTS / f"kernels-compiled{release and f'-triton-{release}'}.json"


def triton_of_this_environment() -> str:
    """Newer than all others, or it stands among them."""
    found = importlib.metadata.version("triton")
    assert all(not found.startswith(f"{release.values[0]}.") for release in RELEASES[1:])
    return found


def judged(release: str, *arguments: str) -> dict[str, Any]:
    """The gate's report, after the checks that hold for all of its runs."""
    path = ENVIRONMENTS / f"triton-{release}" if release else None
    done = gate("--json", *arguments, path=path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["triton"].startswith(release or triton_of_this_environment())
    assert report["faults"] == []
    assert {kernel["op"] for kernel in report["kernels"]} == set(OPS)
    assert {kernel["arch"] for kernel in report["kernels"]} == set(ARCHS)
    assert all(kernel["stack"] == 0 for kernel in report["kernels"])
    return report


def without_sources(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Python's syntax trees, and so that hash, are not the same in each of its releases."""
    return [{name: value for name, value in k.items() if name != "sources"} for k in kernels]


@pytest.mark.parametrize("release", RELEASES)
def test_every_kernel(release: str) -> None:
    """Those whose machine code is not on record are compiled, and then the record is old."""
    report = judged(release, "--known", str(figures(release)))
    record = json.loads(figures(release).read_text())
    found, known = (without_sources(kernels["kernels"]) for kernels in (report, record))
    assert found == known, "figures of older kernels: make kernels-table"
    assert report["compiled"] == 0


@pytest.mark.extended
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("release", RELEASES)
def test_the_record_is_what_the_compiler_says(release: str) -> None:
    record = json.loads(figures(release).read_text())
    assert without_sources(judged(release)["kernels"]) == without_sources(record["kernels"])


def test_an_edited_kernel_is_compiled(tmp_path: Path) -> None:
    """One constant is another: its figures are not taken from the record, all others are."""
    known = json.loads(figures("").read_text())
    plan = next(k for k in known["kernels"] if k["op"] == "work_plan" and k["arch"] == 90)
    edited = tmp_path / "figures.json"
    before = "of the kernel before the edit"
    record = figures("").read_text()
    edited.write_text(record.replace(plan["fingerprint"], before).replace(plan["sources"], before))
    done = gate("--json", "--arch", "90", "--only", "work_plan", "--known", str(edited))
    report = json.loads(done.stdout)
    assert report["compiled"] == 1
    assert report["kernels"] == [plan]


def test_fingerprints_follow_what_decides_the_code() -> None:
    """In a process that compiles: a constant, an option, a type, the chip; not the name."""
    program = """
import dataclasses
import torch
from m3_kernels.testing.compile_gate import fingerprint, sources
from m3_kernels.testing.production.work_plan import variants
base, = variants(90)
def hashed(variant, arch):
    return fingerprint(variant, arch), sources(variant, arch)
def change(**arguments):
    arguments = dict(base.launch.arguments, **arguments)
    launch = dataclasses.replace(base.launch, arguments=arguments)
    return hashed(dataclasses.replace(base, launch=launch), 90)
numbers = torch.zeros(9, dtype=torch.int32)
same = [
    hashed(base, 90),
    hashed(dataclasses.replace(base, name="other"), 90),
    change(num_rows=1), change(num_rows=16), change(num_rows=17),
    change(seq_lens=numbers),
]
others = [
    hashed(base, 80),
    change(num_warps=8),
    change(seq_lens=numbers[1:]),
    change(cum_blocks=numbers.long()),
    change(PAGE_SIZE=64),
]
for kind in range(2):
    one, all = {pair[kind] for pair in same}, {pair[kind] for pair in same + others}
    assert len(one) == 1 and len(all) == 6, (same, others)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


def test_comments_and_lines_are_no_sources(tmp_path: Path) -> None:
    """The hash of the modules is of what they say."""
    told = ("x = 1\n", "# why\n\nx = 1\n", "x = 2\n")
    assert len({syntax([_written(tmp_path, text)]) for text in told}) == 2


def _written(folder: Path, text: str) -> Path:
    path = folder / "kernel.py"
    path.write_text(text)
    return path


def variant(**changes: object) -> Variant:
    launch = Launch(None, (1,), {"PDL": changes.pop("dependent", False)})
    base = Variant("v", launch, registers=64, shared=200_000, needs=("HGMMA",))
    return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]


def compiled(**counts: int) -> Compiled:
    instructions = {"LDL": 0, "STL": 0, "HGMMA": 4, **counts}
    return Compiled(registers=64, stack=0, shared=90_000, warps=4, instructions=instructions)


def test_judgement() -> None:
    assert faults(variant(), compiled(), 90) == []
    spilled = dataclasses.replace(compiled(), stack=8)
    assert faults(variant(), spilled, 90) == [
        "sm_90 v: spills: 8 bytes of stack, 0 loads and stores"
    ]
    assert "1 loads and stores" in faults(variant(), compiled(STL=1), 90)[0]
    assert faults(variant(registers=63), compiled(), 90) == ["sm_90 v: 64 registers, budget 63"]
    assert "budget 80000" in faults(variant(shared=80_000), compiled(), 90)[0]
    assert faults(variant(), compiled(HGMMA=0), 90) == ["sm_90 v: no HGMMA"]
    large = dataclasses.replace(compiled(), shared=110_000)
    assert faults(variant(), large, 90) == []
    assert faults(variant(), large, 120) == [
        f"sm_120 v: 110000 bytes of shared memory, budget {SHARED_LIMIT[120]}"
    ]
    waiting = dataclasses.replace(compiled(), dependency=("wait", "launch_dependents"))
    assert faults(variant(dependent=True), waiting, 90) == []
    assert "grid dependency" in faults(variant(), waiting, 90)[0]
    assert "grid dependency" in faults(variant(dependent=True), compiled(), 90)[0]


def test_dependency_in_ptx() -> None:
    wait, launch = "\tgriddepcontrol.wait; // dummy %r1\n", "\tgriddepcontrol.launch_dependents;\n"
    load = "\t@%p1 ld.global.b32 { %r2 }, [ %rd1 + 0 ];\n"
    assert dependency(wait + launch + load) == ("wait", "launch_dependents")
    assert dependency(load) == ()
    assert dependency(load + wait + launch) == ("access", "wait", "launch_dependents")
    assert dependency(launch + wait) == ("launch_dependents", "wait")


def kernels_of_a_layer() -> list[Any]:
    """What a layer launches; the plan runs once per step, and the products are of other layers."""
    found = {}
    for op in OPS:
        if op not in ("work_plan", "page_table", "mxfp8_linear"):
            kernels = [variant.launch.kernel for variant in op_variants(op, 90)]
            found |= {kernel.__name__: kernel for kernel in kernels}
    return list(found.values())


def test_every_kernel_of_a_layer_waits_first() -> None:
    """Before any return: a grid that ends without having waited breaks the chain behind it."""
    kernels = kernels_of_a_layer()
    assert len(kernels) >= 6
    for kernel in kernels:
        definition = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
        assert isinstance(definition, ast.FunctionDef)
        docstring, first = definition.body[:2]
        assert isinstance(docstring, ast.Expr)
        assert ast.unparse(first) == "await_previous_launch(PDL)", kernel.__name__


def test_which_launches_may_begin_early() -> None:
    from m3_kernels.triton_shared import dependent_launch

    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert dependent_launch(gpu, 90) == {"PDL": True, "launch_pdl": True}
    assert dependent_launch(gpu, 120) == {"PDL": True, "launch_pdl": True}
    assert dependent_launch(gpu, 89) == {"PDL": False}
    assert dependent_launch(cpu, 90) == {"PDL": False}


def test_interpreted_kernels_are_refused() -> None:
    from m3_kernels.testing.compile_gate import compile_variant
    from m3_kernels.testing.production.work_plan import variants

    with pytest.raises(RuntimeError, match="nothing compiles with TRITON_INTERPRET=1; unset it"):
        compile_variant(next(variants(90)), 90)
