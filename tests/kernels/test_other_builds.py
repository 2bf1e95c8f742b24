"""The kernels of processors that are not this one: tests of results on their builds, or a compiler.

Each build runs the tests that compare the kernels with their oracles, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3_kernels import native_build
from tests.kernels.other_builds import BUILDS, VARIABLE, Build, commands

pytestmark = pytest.mark.extended

REPOSITORY = Path(__file__).parents[2]
TESTS = (
    "test_quantised.py",
    "test_dense_attention.py",
    "test_sparse_attention.py",
    "test_index_topk.py",
    "test_index_planes.py",
    "test_index_shares.py",
    "test_cache_store.py",
    "test_norm_rope_store.py",
)
# As -march=native is resolved there; g++ 12 does not know the name of AMD's with AVX-512.
OF_X86 = {
    "AVX-512": ("-march=skylake-avx512",),
    "VNNI": ("-march=cascadelake",),
    "bf16 products and AMX": ("-march=sapphirerapids",),
    "AMD": ("-march=znver3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
}


@pytest.mark.parametrize("name", BUILDS)
def test_equals_the_oracles(name: str) -> None:
    """What asks for "native" by name, or takes it as the best of a CPU."""
    build = BUILDS[name]
    if reason := build.refusal():
        pytest.skip(reason)
    files = [str(REPOSITORY / "tests" / "kernels" / file) for file in TESTS]
    program = (
        "import sys, pytest\n"
        "from m3_kernels import native_build\n"
        "from tests.kernels import other_builds\n"
        "assert native_build.refusal() is None\n"
        f"assert native_build.vector_family().startswith({build.family!r})\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=REPOSITORY,
        env={**os.environ, VARIABLE: name, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("flags", OF_X86.values(), ids=OF_X86)
def test_compiles_without_a_warning(flags: tuple[str, ...], tmp_path: Path) -> None:
    """No emulator at hand has AVX-512: a compiler is all that has seen these builds."""
    build = Build(native_build.COMPILERS[0], (*flags, "-Werror"), None, "")
    if reason := build.refusal():
        pytest.skip(reason)
    *compiling, _ = commands(build, tmp_path / "kernels")
    for command in compiling:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
