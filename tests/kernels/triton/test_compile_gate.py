"""Every Triton kernel compiles for every chip at its chosen configuration, within its budget."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from m3_kernels.testing.compile_gate import ARCHS, OPS, SHARED_LIMIT, Compiled, Variant, faults

# The release that torch 2.11 brings; `make test` puts it there.
OLDER_TRITON = Path(__file__).parents[3] / ".venv" / "triton-3.6"


def gate(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles: without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-m", "m3_kernels.testing.compile_gate", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


Gates = dict[tuple[int, bool], Future[subprocess.CompletedProcess[str]]]

# What the older Triton spills a few registers of, on the chips it is asked about. Nothing else may.
OLDER_SPILLS = {
    80: {"prefill bf16 KV bf16"},
    90: {
        "decode q_len 4 bf16 KV bf16",
        "decode q_len 4 bf16 KV fp8e4nv",
        "prefill bf16 KV bf16",
        "prefill bf16 KV fp8e4nv",
    },
}


@pytest.fixture(scope="module")
def gates() -> Iterator[Gates]:
    """Runs of the gate by (chip, older Triton), two at a time: compiling takes one core each."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {(arch, False): pool.submit(gate, "--arch", str(arch), "--json") for arch in ARCHS}
        if OLDER_TRITON.exists():
            for arch in OLDER_SPILLS:
                runs[arch, True] = pool.submit(
                    gate, "--arch", str(arch), "--json", path=OLDER_TRITON
                )
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
@pytest.mark.parametrize("arch", OLDER_SPILLS)
def test_every_kernel_with_the_older_triton(arch: int, gates: Gates) -> None:
    report = json.loads(gates[arch, True].result().stdout)
    assert report["triton"].startswith("3.6")
    allowed = {f"sm_{arch} {name}: spills" for name in OLDER_SPILLS[arch]}
    assert {":".join(line.split(":")[:2]) for line in report["faults"]} <= allowed
    assert all(kernel["stack"] <= 128 for kernel in report["kernels"])


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


def test_interpreted_kernels_are_refused() -> None:
    from m3_kernels.testing.compile_gate import compile_variant
    from m3_kernels.work_plan.triton_variants import variants

    with pytest.raises(RuntimeError, match="nothing compiles with TRITON_INTERPRET=1; unset it"):
        compile_variant(variants(90)[0], 90)
