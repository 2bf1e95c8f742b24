"""Compiles the C++ kernels once per machine and loads them; a failure is a reason, not an error.

The kernels have a plain C interface and include no torch header, so they compile in seconds, fit
any torch, and are called through ctypes, which releases the interpreter lock.

A library is code: it is loaded only from a folder and a file that belong to this user and that
nobody else can write. Where the user's cache is no such folder, a private temporary one is used and
removed when the process ends.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from m3_kernels.stored_matrix import KINDS, StoredMatrix

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
HEADERS = tuple(
    PACKAGE / name
    for name in ("native_common.h", "native_attention.h", "native_planes.h", "native_matrix.h")
)
SOURCES = tuple(
    PACKAGE / op / "native.cpp"
    for op in (
        "index_topk",
        "index_merge",
        "sparse_attention",
        "dense_attention",
        "cache_store",
        "norm_rope_store",
        "quantised_linear",
        "quantised_experts",
    )
)
FUNCTIONS = (
    "m3_index_topk",
    "m3_index_merge",
    "m3_sparse_attention",
    "m3_dense_attention",
    "m3_cache_store",
    "m3_norm_and_rope",
    "m3_quantised_linear",
    "m3_quantised_experts",
)
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
# Longer than any compilation: who still waits then waits for something else.
LOCK_TIMEOUT_SECONDS = 600
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.int8: 5,
    torch.uint8: 6,
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


def matrix_arguments(
    matrix: StoredMatrix,
) -> tuple[tuple[Array | None, ...], tuple[int, int]]:
    """A weight as the kernels take it: its tensors, and its kind and columns per scale.

    A matrix without groups is one group. The caller keeps the matrix alive.
    """
    parts = (matrix.codes, matrix.scales, matrix.zeros, matrix.factors)
    arrays = tuple(None if part is None else array(part) for part in parts)
    if matrix.codes.dim() == 2:
        arrays = tuple(None if part is None else _one_of(part) for part in arrays)
    return arrays, (KINDS.index(matrix.kind), matrix.group)


def _one_of(part: Array) -> Array:
    """An array of at most three dimensions with one of size 1 in front."""
    size, stride = part.size, part.stride
    return Array(
        part.data, part.dtype, (1, size[0], size[1], size[2]), (0, stride[0], stride[1], stride[2])
    )


def host_numbers(*values: int) -> tuple[Array, ctypes.Array[ctypes.c_int32]]:
    """A few int32 numbers as a kernel takes a tensor; the caller keeps the second result alive."""
    memory = (ctypes.c_int32 * len(values))(*values)
    address = ctypes.addressof(memory)
    return Array(address, DTYPE_CODES[torch.int32], (len(values),), (1,)), memory


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


def vector_family() -> str:
    """The processor's vectors that the kernels were compiled for, in words.

    Raises
    ------
    NativeUnavailableError : they cannot run here
    """
    function = library().m3_vector_family
    function.restype = ctypes.c_char_p
    return function().decode()


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
    try:
        loaded = _built_and_loaded(compiler, f"{_fingerprint(compiler)}.so")
    except OSError as error:
        # a full disk, a file system without locks: other kernels serve, with this reason
        raise NativeUnavailableError(f"the C++ kernels cannot be built or kept: {error}") from error
    for function in FUNCTIONS:
        getattr(loaded, function).restype = ctypes.c_int64
    return loaded


def _built_and_loaded(compiler: Sequence[str], name: str) -> ctypes.CDLL:
    """The library of that name, compiled if it is not there, and again if it cannot be loaded.

    Raises
    ------
    NativeUnavailableError : the build failed, or even a fresh library does not load
    OSError : the folder cannot be used
    """
    folder = _cache_folder()
    if folder is None:
        # Never load code from a shared temporary folder: a private one, for this process only.
        folder = _private_folder()
    path = folder / name
    _expose_openmp()
    with _locked(folder / f"{name}.lock"):
        # Several workers start at once; one compiles, the others wait and find the result.
        try:
            if (kept := _load(path)) is not None:
                return kept
        except _UnusableError as error:
            # not by this user, or cut short by a full disk: it would stay so for ever
            logger.warning("%s; it is not used, but compiled again", error)
            path.unlink()
        _compile(compiler, path)
        try:
            fresh = _load(path)
        except _UnusableError as error:
            raise NativeUnavailableError(f"the C++ kernels do not load: {error}") from error
        assert fresh is not None
        return fresh


class _UnusableError(RuntimeError):
    """A library is there and must or can not be loaded; the message says why."""


def _load(path: Path) -> ctypes.CDLL | None:
    """The library in that file, None if there is no such file.

    Raises
    ------
    _UnusableError : not this user's own, or no whole library.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if (distrust := _distrust(path, found, is_kind=stat.S_ISREG)) is not None:
        raise _UnusableError(distrust)
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header[:5] == b"\x7fELF\x02":
        # Linkers write the table of sections last. A library that lacks its end may load, and end
        # the process when it is first called.
        (table,) = struct.unpack_from("=Q", header, 0x28)
        entry_size, entries = struct.unpack_from("=HH", header, 0x3A)
        if found.st_size < table + entry_size * entries:
            raise _UnusableError(f"{path} is cut short ({found.st_size:,} bytes)")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _UnusableError(str(error)) from error


def _find_compiler() -> tuple[str, ...]:
    """The C++ compiler as a command: `CXX` ("ccache g++" too) if set, else the first one found."""
    wanted = os.environ.get("CXX", "").strip()
    candidates = (wanted,) if wanted else COMPILERS
    for candidate in candidates:
        try:
            program, *arguments = shlex.split(candidate)
        except ValueError as error:
            raise NativeUnavailableError(f"CXX={candidate!r} is no command: {error}") from error
        if found := shutil.which(program):
            return (found, *arguments)
    raise NativeUnavailableError(f"no C++ compiler found (looked for {', '.join(candidates)})")


def _fingerprint(compiler: Sequence[str]) -> str:
    """Hash of everything the machine code depends on, `-march=native` included."""
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        command = " ".join(compiler)
        raise NativeUnavailableError(f"{command} --version failed: {error}") from error
    # the arguments too: "g++ -m32" has the version of g++
    parts = [version, *compiler[1:], " ".join(COMPILE_FLAGS), platform.machine(), _cpu_features()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in (*HEADERS, *SOURCES):
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
    """The user's folder for compiled kernels, made if need be; None, with a log line, if unsafe."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = None
    try:
        above = Path(base) if base else Path.home() / ".cache"
        above.mkdir(parents=True, exist_ok=True)
        # whoever can write to the first could put another folder in the second one's place
        parent, folder = above / "m3-plugin", above / "m3-plugin" / "native"
        distrust = _made_private(parent) or _made_private(folder)
        if distrust is None and not os.access(folder, os.W_OK):
            distrust = f"{folder} cannot be written"
    except (OSError, RuntimeError) as error:
        distrust = f"the cache of compiled kernels cannot be used: {error}"
    if distrust is not None:
        logger.warning("%s; this process compiles the C++ kernels for itself", distrust)
        return None
    return folder


def _made_private(folder: Path) -> str | None:
    """Make a folder that only this user may write to; why it is none, if it cannot be had."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if own and found.st_mode & _WRITABLE_BY_OTHERS:
        # as the umask of many systems makes it; the files in it are looked at one by one
        folder.chmod(0o700)
        found = folder.lstat()
    return _distrust(folder, found, is_kind=stat.S_ISDIR)


@cache
def _private_folder() -> Path:
    """A folder of this process alone, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="m3-plugin-native-"))
    owner = os.getpid()

    def remove() -> None:
        # a forked worker must not take the folder from its parent
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _distrust(path: Path, found: os.stat_result, *, is_kind: Callable[[int], bool]) -> str | None:
    """Why code below or in `path` could be somebody else's, None if it is this user's own.

    Parameters
    ----------
    found : its `lstat`: links are not followed, what they point to may be exchanged
    is_kind : `stat.S_ISDIR` or `stat.S_ISREG`
    """
    if not is_kind(found.st_mode):
        return f"{path} is a link or of another kind than it should be"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        return f"others may write to {path} (mode {stat.S_IMODE(found.st_mode):o})"
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file of this user, and of nobody else, while the context lasts.

    Raises
    ------
    NativeUnavailableError : another process held it for `LOCK_TIMEOUT_SECONDS`.
    OSError : it is a link, or the file system has no locks.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(path, flags, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NativeUnavailableError(
                        f"another process held {path} for {LOCK_TIMEOUT_SECONDS} s; end it"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        # which ends the lock too
        os.close(lock)


def _compile(compiler: Sequence[str], target: Path) -> None:
    """Compile and link next to `target`, then move it in place in one step."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.parent.name}.o") for source in SOURCES]
        with _compilers() as started:
            for source, output in zip(SOURCES, objects, strict=True):
                flags = [*COMPILE_FLAGS, f"-I{PACKAGE}", "-c", str(source), "-o", output]
                started.append(_start([*compiler, *flags]))
            for process in started:
                _finish(process)
        # Linked without -fopenmp on purpose: the runtime must be the one torch has already loaded.
        # A second one would keep its own threads spinning next to torch's.
        built = Path(scratch) / target.name
        with _compilers() as started:
            started.append(_start([*compiler, "-shared", *objects, "-o", str(built)]))
            _finish(started[0])
        built.chmod(0o700)
        os.replace(built, target)
    logger.info(
        "compiled the C++ kernels with %s in %.1f s: %s",
        " ".join(compiler),
        time.monotonic() - start,
        target,
    )


@contextmanager
def _compilers() -> Iterator[list[subprocess.Popen[str]]]:
    """Compilers that are started within; what still runs at its end, after a failure, is ended."""
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                # g++ only drives other programs, which would go on
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise NativeUnavailableError(f"{command[0]} does not start: {error}") from error


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=COMPILE_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
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
