"""Our kernels, compiled for sm_80 and sm_89 and run as PTX, against the references of their ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interpreters import Forking, forking

MODULE = "tests.kernels.ptx.kernels"
# By name: here the files of kernels are left to tests that interpret them.
CHECKS = (
    *("page table", "work plan", "store bf16", "store e5m2 and int8", "store e4m3"),
    *("norm and store", "choice and attention", "choice and attention of 8 bits"),
    *("product of few tokens", "products of experts", "every code of mxfp8"),
)
EXTENDED = (
    *("decode", "verify", "prefill", "mixed, in another order", "decode of 8 bits"),
    *("prefill of 8 bits", "decode of e4m3", "prefill of e4m3", "every code of mxfp8 on sm_89"),
)
PLANTED = ("missing barriers", "missing waits", "slots beyond a table")


@pytest.fixture(scope="module")
def compiling() -> Iterator[Forking]:
    """Processes whose Triton compiles; in this one it interprets."""
    with forking(MODULE, "triton", "m3_kernels.testing.ptx.launch") as processes:
        yield processes


def run(processes: Forking, script: str) -> str:
    """What a script prints that knows the names of `kernels.py`."""
    done = processes.run(f"from {MODULE} import *\n{script}")
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("name", CHECKS)
def test_equals_the_reference(compiling: Forking, name: str) -> None:
    run(compiling, f"CHECKS[{name!r}]()")


@pytest.mark.parametrize("name", PLANTED)
def test_finds_what_is_planted(compiling: Forking, name: str) -> None:
    run(compiling, f"PLANTED[{name!r}]()")


@pytest.mark.extended
@pytest.mark.parametrize("name", EXTENDED)
def test_a_step_of_a_session(compiling: Forking, name: str) -> None:
    run(compiling, f"EXTENDED[{name!r}]()")


def test_every_check_is_run(compiling: Forking) -> None:
    names = run(compiling, "print(sorted([*CHECKS, *EXTENDED, *PLANTED]))")
    assert names.strip() == str(sorted([*CHECKS, *EXTENDED, *PLANTED]))
