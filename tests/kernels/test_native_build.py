"""Compiling and loading the C++ kernels: once, with torch's threads, and with reasons when not."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3_kernels import kernel_families, native_build
from m3_kernels.capability import implementation_for
from m3_kernels.native_build import FUNCTIONS, NativeUnavailableError

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


# As a compiler that writes an empty library at once: what matters here is which file is used.
COPY = 'for last; do :; done; case "$1" in --version) echo 3.0;; *) cp {library} "$last";; esac'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with our functions' names, which a compiler of the tests hands out."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "empty.c"
    source.write_text("\n".join(f"long {name}(void) {{ return 0; }}" for name in FUNCTIONS))
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", folder / "empty.so", source], check=True, timeout=60
    )
    return folder / "empty.so"


@pytest.fixture
def copying(fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, for a compiler that copies; a file in it is only used if trusted."""
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, COPY.format(library=built))))
    monkeypatch.setattr(native_build, "_expose_openmp", lambda: None)
    native_build._private_folder.cache_clear()
    return fresh / "cache" / "m3-plugin" / "native"


def test_workers_starting_together_compile_once(tmp_path: Path, built: Path) -> None:
    """By a compiler that takes long enough for all of them to come."""
    slow = COPY.replace("*) cp", "*) sleep 2; cp").format(library=built)
    environment = {
        "XDG_CACHE_HOME": str(tmp_path),
        "CXX": str(fake_compiler(tmp_path, slow)),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        # the package that is tested here, wherever another copy is installed
        "PYTHONPATH": str(native_build.PACKAGE.parent),
    }
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


def loaded_from(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is handed to the dynamic loader from now on."""
    loaded: list[Path] = []
    real = ctypes.CDLL

    def load(path: str) -> object:
        loaded.append(Path(path))
        return real(path)

    monkeypatch.setattr(ctypes, "CDLL", load)
    return loaded


def planted(folder: Path, *, content: bytes = b"planted") -> Path:
    """A file under the name that the library will have."""
    folder.mkdir(parents=True, mode=0o700)
    path = folder / f"{native_build._fingerprint(native_build._find_compiler())}.so"
    path.write_bytes(content)
    path.chmod(0o700)
    return path


def test_only_this_user_may_write_what_is_loaded(
    copying: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    umask = os.umask(0)
    try:
        native_build.library()
    finally:
        os.umask(umask)
    for path in (copying.parent, copying, *copying.iterdir()):
        assert path.stat().st_mode & 0o022 == 0, path


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_is_closed_to_them(copying: Path, mode: int) -> None:
    copying.mkdir(parents=True)
    copying.chmod(mode)
    assert native_build._cache_folder() == copying
    assert copying.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o722, 0o720, 0o702])
def test_a_library_that_others_may_write_is_built_anew(
    copying: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = planted(copying)
    path.chmod(mode)
    native_build.library()
    assert path.read_bytes() != b"planted"
    assert "others may write to" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("given", ["library", "folder", "parent"])
def test_what_belongs_to_another_user_is_not_loaded(
    copying: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: str,
) -> None:
    path = planted(copying)
    os.chown({"library": path, "folder": copying, "parent": copying.parent}[given], 65534, -1)
    files = loaded_from(monkeypatch)
    native_build.library()
    assert "belongs to user 65534" in caplog.text
    if given == "library":
        assert path.stat().st_uid == 0
    else:
        # in a folder of this process alone
        assert path.read_bytes() == b"planted"
        assert path not in files
        assert native_build._private_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("linked", ["library", "folder"])
def test_links_are_not_followed(
    copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    path = planted(copying)
    target = tmp_path / "elsewhere"
    (path if linked == "library" else copying).rename(target)
    (path if linked == "library" else copying).symlink_to(target)
    files = loaded_from(monkeypatch)
    native_build.library()
    kept = target if linked == "library" else target / path.name
    assert kept.read_bytes() == b"planted"
    assert linked == "library" or path not in files


@pytest.mark.parametrize("left", [0, 40, 0.5, 0.9])
def test_a_library_that_was_cut_short_is_built_once_more(
    copying: Path, built: Path, caplog: pytest.LogCaptureFixture, left: float
) -> None:
    whole = built.read_bytes()
    path = planted(copying, content=whole[: int(left * len(whole)) if left < 1 else int(left)])
    native_build.library()
    assert path.read_bytes() == whole
    assert "compiled again" in caplog.text


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSPC", "EROFS"])
def test_a_file_system_without_locks_or_room_is_a_reason(
    copying: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", fail)
    native, *others = kernel_families("cpu")
    assert native.refusal is not None
    assert os.strerror(getattr(errno, code)) in native.refusal
    assert others[0].refusal is None


def test_a_lock_that_stays_held_is_a_reason(copying: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted(copying)
    lock = path.with_name(f"{path.name}.lock")
    monkeypatch.setattr(native_build, "LOCK_TIMEOUT_SECONDS", 0.2)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refusal = kernel_families("cpu")[0].refusal
    assert refusal == f"another process held {lock} for 0.2 s; end it"


def test_a_lock_that_is_a_link_is_not_opened(copying: Path, tmp_path: Path) -> None:
    path = planted(copying)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.with_name(f"{path.name}.lock").symlink_to(victim)
    assert kernel_families("cpu")[0].refusal is not None
    assert victim.read_text() == "mine"


def test_the_compiler_may_be_a_command(
    copying: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = os.environ["CXX"]
    monkeypatch.setenv("CXX", f"env {compiler}")
    assert native_build._find_compiler()[1:] == (compiler,)
    native_build.library()
    monkeypatch.setenv("CXX", "'unclosed")
    with pytest.raises(NativeUnavailableError, match="is no command"):
        native_build._find_compiler()


@pytest.mark.timeout(120)
def test_a_failed_compilation_ends_its_siblings(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        f'case "$*" in *--version*) echo 4.0;; *index_topk*) exit 1;; '
        f"*) echo $$ >> {fresh}/pids; sleep 300;; esac"
    )
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, script)))
    # the limit above is below the siblings' sleep: waiting for them would end the test
    assert "do not compile" in str(native_build.refusal())
    for pid in (fresh / "pids").read_text().split() if (fresh / "pids").exists() else []:
        assert not Path(f"/proc/{pid}").exists()


def test_the_folder_of_one_process_goes_with_it(tmp_path: Path, built: Path) -> None:
    """Without a home to write to, nothing is left in the temporary folder."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cache").touch()
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
        "CXX": str(fake_compiler(tmp_path, COPY.format(library=built))),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "None", done.stderr
    assert "for itself" in done.stderr
    assert list((tmp_path / "tmp").glob("m3-plugin-*")) == []


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
