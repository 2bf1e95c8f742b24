"""Compiling and loading the C++ kernels: once, with torch's threads, and with reasons when not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3_kernels import kernel_families, native_build
from m3_kernels.capability import implementation_for
from m3_kernels.native_build import NativeUnavailableError

LOAD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from m3_kernels import kernel_families
print(kernel_families("cpu")[0].refusal)
"""


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of kernels, and no memory of earlier attempts, for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (native_build.library, native_build.refusal):
        cached.cache_clear()
    return tmp_path


@pytest.fixture(autouse=True)
def forget():
    yield
    for cached in (native_build.library, native_build.refusal):
        cached.cache_clear()


def test_workers_starting_together_compile_once(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [out.strip() for out, _ in outputs] == ["None"] * 3
    assert sum(err.count("compiled the C++ kernels") for _, err in outputs) == 1
    folder = tmp_path / "m3-plugin" / "native"
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native, *others = kernel_families("cpu")
    assert native.name == "native"
    assert native.refusal == "no C++ compiler found (looked for no-such-compiler)"
    assert [family.refusal for family in others[:2]] == [None, None]
    assert implementation_for("op", backend="auto", device_type="cpu") == "torch"
    with pytest.raises(NotImplementedError, match="no C\\+\\+ compiler found"):
        implementation_for("op", backend="native", device_type="cpu")


def test_a_failed_build_gives_the_compilers_message(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = 'case "$1" in --version) echo 1.0;; *) echo "x.cpp:1: error: too old"; exit 1;; esac'
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, script)))
    refusal = kernel_families("cpu")[0].refusal
    assert refusal == "the C++ kernels do not compile (exit 1): x.cpp:1: error: too old"
    assert caplog.text.count("error: too old") == 1
    left = [path.suffix for path in (fresh / "cache" / "m3-plugin" / "native").iterdir()]
    assert left == [".lock"]


def test_a_library_that_does_not_load_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'for last; do :; done; case "$1" in --version) echo 2.0;; *) echo > "$last";; esac'
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, script)))
    with pytest.raises(NativeUnavailableError, match="do not load"):
        native_build.library()


def test_an_unusable_cache_folder_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native_build._cache_folder() is None


def test_other_devices_are_refused_with_a_reason() -> None:
    for family in kernel_families("cuda")[1:]:
        assert family.refusal == "computes on CPU tensors only"
    with pytest.raises(NotImplementedError, match="computes on CPU tensors only"):
        implementation_for("op", backend="native", device_type="cuda")
    with pytest.raises(NotImplementedError, match="'xpu'"):
        implementation_for("op", backend="torch", device_type="xpu")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_is_loaded() -> None:
    script = LOAD + (
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({m for m in maps if 'libgomp' in m or 'libiomp' in m or 'libomp' in m}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == ["None", "1"]


def test_descriptors_hold_the_real_strides() -> None:
    tensor = torch.empty(3, 4, 5)[:, 1:3].transpose(0, 1)
    described = native_build.array(tensor)
    assert list(described.size) == [2, 3, 5, 0]
    assert list(described.stride) == [5, 20, 1, 0]
    assert described.data == tensor.data_ptr()


PRELOADED = sorted(Path(sys.prefix, "lib").glob("libiomp5.so"))


@pytest.mark.skipif(not PRELOADED, reason="no other OpenMP runtime here")
def test_a_preloaded_runtime_serves_the_kernels_too() -> None:
    script = LOAD + (
        "from m3_kernels import native_build\n"
        "native_build.WORK_PER_THREAD = 1\n"
        "from m3_kernels.index_topk import index_topk\n"
        "from m3_kernels.testing.cases import build, production_cases\n"
        "i = build(production_cases()[0])\n"
        "print(index_topk(i.index_q, i.index_k_pages, **i.batch, **i.selection).sum().item())\n"
    )
    sums = []
    for preload in ("", str(PRELOADED[0])):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "LD_PRELOAD": preload},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        sums.append(done.stdout.split())
    assert sums[0] == sums[1]
    assert sums[0][0] == "None"
