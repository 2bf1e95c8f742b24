"""Compiles the C++ kernels once per machine and loads them; a failure is a reason, not an error.

The kernels have a plain C interface and include no torch header, so they compile in seconds, fit
any torch, and are called through ctypes, which releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
HEADER = PACKAGE / "native_common.h"
SOURCES = tuple(
    PACKAGE / op / "native.cpp"
    for op in ("index_topk", "sparse_attention", "cache_store", "norm_rope_store")
)
FUNCTIONS = ("m3_index_topk", "m3_sparse_attention", "m3_cache_store", "m3_norm_and_rope")
# No fast-math: the kernels rely on NaN and infinity. Contraction is on because one chain of fused
# multiply-adds per result is what makes results independent of tiling.
COMPILE_FLAGS = (
    "-std=gnu++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=default",
    "-Wall",
    "-Wno-psabi",
)
COMPILERS = ("g++", "c++", "clang++")
COMPILE_TIMEOUT_SECONDS = 300

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.int8: 5,
}

# Multiply-adds that are worth one more thread, about 25 microseconds of one core's time.
WORK_PER_THREAD = 2**20

OUT_OF_MEMORY = 1
PAGE_OUTSIDE_POOL = 2
ROWS_OUTSIDE_QUERIES = 3
PAGE_TABLE_TOO_NARROW = 4
SLOT_OUTSIDE_POOL = 5


class NativeUnavailableError(RuntimeError):
    """The C++ kernels cannot be compiled or loaded here; the message says why."""


class Array(ctypes.Structure):
    """A tensor as the kernels see it, `m3::Array` in native_common.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )


def array(tensor: Tensor) -> Array:
    """Describe a tensor of at most four dimensions; the caller keeps the tensor alive."""
    return Array(
        tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tuple(tensor.stride())
    )


def call(function: str, *arguments: Array | int | float | None) -> None:
    """Call a kernel with at most torch's number of threads and raise what it reports.

    Raises
    ------
    IndexError, ValueError, MemoryError : the step's description names something that is not there
    """
    converted = [
        ctypes.byref(a)
        if isinstance(a, Array)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        if isinstance(a, int)
        else None
        for a in arguments
    ]
    bad = ctypes.c_int64()
    team = ctypes.c_int64(torch.get_num_threads()), ctypes.c_int64(WORK_PER_THREAD)
    status = getattr(library(), function)(*converted, *team, ctypes.byref(bad))
    if status == 0:
        return
    op = function.removeprefix("m3_")
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"{op}: no memory for the workspace")
    if status == PAGE_OUTSIDE_POOL:
        raise IndexError(f"{op}: page_table must name pages of the pool; got page {bad.value}")
    if status == ROWS_OUTSIDE_QUERIES:
        raise ValueError(
            f"{op}: cu_seqlens_q must rise from 0 to at most the number of query rows; "
            f"got {bad.value}"
        )
    if status == PAGE_TABLE_TOO_NARROW:
        raise ValueError(f"{op}: page_table must cover every sequence; got {bad.value} blocks")
    if status == SLOT_OUTSIDE_POOL:
        raise IndexError(f"{op}: slot_mapping must name slots of the pool; got {bad.value}")
    raise RuntimeError(f"{op}: unknown status {status}")


@cache
def refusal() -> str | None:
    """Why the C++ kernels cannot run here, or None if they can; compiles them at the first call."""
    try:
        library()
    except NativeUnavailableError as error:
        logger.warning("the C++ kernels are not used: %s", error)
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels, compiled first if this machine has no build of these sources.

    Raises
    ------
    NativeUnavailableError : no compiler, a failed build, or a library that does not load
    """
    compiler = _find_compiler()
    name = f"{_fingerprint(compiler)}.so"
    folder = _cache_folder()
    if folder is None:
        # Never load code from a shared temporary folder: a private one, for this process only.
        folder = Path(tempfile.mkdtemp(prefix="m3-plugin-native-"))
    path = folder / name
    with open(folder / f"{name}.lock", "w") as lock:
        # Several workers start at once; one compiles, the others wait and find the result.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, path)
    _expose_openmp()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"the C++ kernels do not load: {error}") from error
    for function in FUNCTIONS:
        getattr(loaded, function).restype = ctypes.c_int64
    return loaded


def _find_compiler() -> str:
    """Absolute path of the C++ compiler: `CXX` if set, else the first one found."""
    wanted = os.environ.get("CXX")
    candidates = (wanted,) if wanted else COMPILERS
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return found
    raise NativeUnavailableError(f"no C++ compiler found (looked for {', '.join(candidates)})")


def _fingerprint(compiler: str) -> str:
    """Hash of everything the machine code depends on, `-march=native` included."""
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailableError(f"{compiler} --version failed: {error}") from error
    parts = [version, " ".join(COMPILE_FLAGS), platform.machine(), _cpu_features()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in (HEADER, *SOURCES):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _cpu_features() -> str:
    """The processor's model and instruction sets, so that a shared home folder is safe."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = re.compile(r"(model|model name|cpu family|flags|Features|CPU part|vendor_id)\s*:")
    return "\n".join(sorted({line for line in lines if wanted.match(line)}))


def _cache_folder() -> Path | None:
    """The user's folder for compiled kernels, created if need be; None if it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "m3-plugin" / "native"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compile(compiler: str, target: Path) -> None:
    """Compile and link next to `target`, then move it in place in one step."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.parent.name}.o") for source in SOURCES]
        processes = [
            _start([compiler, *COMPILE_FLAGS, f"-I{PACKAGE}", "-c", str(source), "-o", output])
            for source, output in zip(SOURCES, objects, strict=True)
        ]
        for process in processes:
            _finish(process)
        # Linked without -fopenmp on purpose: the runtime must be the one torch has already loaded.
        # A second one would keep its own threads spinning next to torch's.
        built = Path(scratch) / target.name
        _finish(_start([compiler, "-shared", *objects, "-o", str(built)]))
        os.replace(built, target)
    logger.info(
        "compiled the C++ kernels with %s in %.1f s: %s",
        compiler,
        time.monotonic() - start,
        target,
    )


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
        )
    except OSError as error:
        raise NativeUnavailableError(f"{command[0]} does not start: {error}") from error


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=COMPILE_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise NativeUnavailableError(f"the C++ compiler took over {error.timeout:.0f} s") from error
    if process.returncode != 0:
        message = " | ".join(line for line in output.splitlines() if "error" in line.lower())
        raise NativeUnavailableError(
            f"the C++ kernels do not compile (exit {process.returncode}): "
            f"{(message or output.strip())[:600]}"
        )


def _expose_openmp() -> None:
    """Make the OpenMP runtime that torch loaded visible to the kernels' undefined symbols.

    Usually it is visible already (torch loads its dependencies globally, and a preloaded runtime
    comes first for everybody); some torch builds rename theirs and keep it to themselves.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    for path in re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        return
