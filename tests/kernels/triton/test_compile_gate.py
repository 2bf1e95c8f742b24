"""Every Triton kernel compiles for every chip at its chosen configuration, within its budget."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_kernels.testing.compile_gate import (
    ARCHS,
    OPS,
    SHARED_LIMIT,
    Compiled,
    Variant,
    dependency,
    faults,
    op_variants,
)

# The release that torch 2.11 brings; `make test` puts it there.
OLDER_TRITON = Path(__file__).parents[3] / ".venv" / "triton-3.6"


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
        timeout=500,
    )


def older_gate(arch: int) -> subprocess.CompletedProcess[str]:
    """All kernels for one chip, compiled by the older Triton."""
    return gate("--arch", str(arch), "--json", path=OLDER_TRITON)


Gates = dict[tuple[int, bool], Future[subprocess.CompletedProcess[str]]]

# Of the chips that the older Triton is asked about these take long enough for the matrix: it reads
# by pointers on sm_120 as on sm_80 and sm_89, and by descriptors on sm_90 as on sm_100.
OLDER_IN_THE_MATRIX = (80, 89, 100)


@pytest.fixture(scope="module")
def gates() -> Iterator[Gates]:
    """Runs of the gate by (chip, older Triton), two at a time: compiling takes one core each."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {(arch, False): pool.submit(gate, "--arch", str(arch), "--json") for arch in ARCHS}
        if OLDER_TRITON.exists():
            for arch in set(ARCHS) - set(OLDER_IN_THE_MATRIX):
                runs[arch, True] = pool.submit(older_gate, arch)
        yield runs


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel(arch: int, gates: Gates) -> None:
    done = gates[arch, False].result()
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["faults"] == []
    assert {kernel["op"] for kernel in report["kernels"]} == set(OPS)
    for kernel in report["kernels"]:
        assert kernel["stack"] == 0, kernel


@pytest.mark.skipif(not OLDER_TRITON.exists(), reason="no .venv/triton-3.6: run make test")
@pytest.mark.parametrize("arch", sorted(set(ARCHS) - set(OLDER_IN_THE_MATRIX)))
def test_every_kernel_with_the_older_triton(arch: int, gates: Gates) -> None:
    judge_older(gates[arch, True].result())


@pytest.mark.extended
@pytest.mark.skipif(not OLDER_TRITON.exists(), reason="no .venv/triton-3.6: run make test")
@pytest.mark.parametrize("arch", OLDER_IN_THE_MATRIX)
def test_every_kernel_with_the_older_triton_on_the_other_chips(arch: int) -> None:
    judge_older(older_gate(arch))


def judge_older(done: subprocess.CompletedProcess[str]) -> None:
    report = json.loads(done.stdout)
    assert report["triton"].startswith("3.6")
    assert report["faults"] == []
    assert {kernel["op"] for kernel in report["kernels"]} == set(OPS)
    assert all(kernel["stack"] == 0 for kernel in report["kernels"])


def variant(**changes: object) -> Variant:
    base = Variant("v", None, {}, {}, {}, registers=64, shared=200_000, needs=("HGMMA",))
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
        if op not in ("work_plan", "mxfp8_linear"):
            found |= {variant.kernel.__name__: variant.kernel for variant in op_variants(op, 90)}
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
    from m3_kernels.work_plan.triton_variants import variants

    with pytest.raises(RuntimeError, match="nothing compiles with TRITON_INTERPRET=1; unset it"):
        compile_variant(variants(90)[0], 90)
