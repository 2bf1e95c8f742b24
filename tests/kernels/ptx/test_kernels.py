"""Our kernels, compiled for sm_80 and sm_89 and run as PTX, against the references of their ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interpreters import Forking, forking
from tests.kernels.ptx import kernels

MODULE = "tests.kernels.ptx.kernels"


@pytest.fixture(scope="module")
def compiling() -> Iterator[Forking]:
    """Processes whose Triton compiles; in this one it interprets."""
    with forking(MODULE, "triton", "m3_kernels.testing.ptx.launch") as processes:
        yield processes


def run(processes: Forking, script: str) -> str:
    done = processes.run(f"from {MODULE} import *\n{script}")
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("name", kernels.CHECKS)
def test_equals_the_reference(compiling: Forking, name: str) -> None:
    run(compiling, f"CHECKS[{name!r}]()")


@pytest.mark.extended
@pytest.mark.parametrize("name", kernels.EXTENDED)
def test_equals_the_reference_in_every_dtype(compiling: Forking, name: str) -> None:
    run(compiling, f"EXTENDED[{name!r}]()")
