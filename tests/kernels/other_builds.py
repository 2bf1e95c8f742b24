"""The C++ kernels as other processors get them, in the place of this machine's.

    M3_OTHER_BUILD=neon pytest -p tests.kernels.other_builds tests/kernels/test_quantised.py

A build for another architecture runs under qemu's user-mode emulation, one process for all calls;
arrays travel there and back. One for this architecture is loaded as it is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from m3_kernels import native_build

VARIABLE = "M3_OTHER_BUILD"
DRIVER = Path(__file__).parent / "emulated.cpp"


@dataclass(frozen=True)
class Build:
    """Kernels for other vectors than this machine's.

    Attributes
    ----------
    compiler : a program
    flags : in the place of `-march=native`
    emulator : what runs them; None if this machine does
    family : how they must name their vectors
    """

    compiler: str
    flags: tuple[str, ...]
    emulator: str | None
    family: str

    def refusal(self) -> str | None:
        """Why they cannot be tried here."""
        if self.emulator is None and platform.machine() != "x86_64":
            return "needs an x86-64 processor"
        for program in filter(None, (self.compiler, self.emulator)):
            if shutil.which(program) is None:
                return f"no {program} (Debian: qemu-user, g++-aarch64-linux-gnu)"
        return None


BUILDS = {
    "neon": Build("aarch64-linux-gnu-g++", ("-march=armv8-a",), "qemu-aarch64", "NEON"),
    "sse2": Build("g++", ("-march=x86-64",), None, "SSE2"),
    # as AVX-512 has them, in portable C++: its intrinsics alone are left out
    "sixteen": Build("g++", ("-march=x86-64", "-DM3_SIXTEEN_LANES"), None, "SSE2"),
}


def commands(build: Build, target: Path) -> list[list[str]]:
    """What compiles a build, one command per source, and links it."""
    kept = [flag for flag in native_build.COMPILE_FLAGS if flag != "-march=native"]
    compiler = [build.compiler, *kept, *build.flags, f"-I{native_build.PACKAGE}"]
    sources = list(native_build.SOURCES)
    if build.emulator is not None:
        sources.append(DRIVER)
    objects = [f"{target}.{number}.o" for number in range(len(sources))]
    compiled = [
        [*compiler, "-c", str(source), "-o", output]
        for source, output in zip(sources, objects, strict=True)
    ]
    how = "-shared" if build.emulator is None else "-static"
    return [*compiled, [build.compiler, how, "-fopenmp", *objects, "-o", str(target)]]


@cache
def library() -> Any:
    """The kernels of the build that the environment names."""
    build = BUILDS[os.environ[VARIABLE]]
    target = Path(tempfile.mkdtemp(prefix="m3-other-build-")) / "kernels"
    *compiling, linking = commands(build, target)
    with ThreadPoolExecutor(2) as two:
        list(two.map(_run, compiling))
    _run(linking)
    if build.emulator is not None:
        return Emulated(build.emulator, target)
    loaded = ctypes.CDLL(str(target))
    for function in native_build.FUNCTIONS:
        getattr(loaded, function).restype = ctypes.c_int64
    return loaded


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Emulated:
    """Functions of a program that runs under an emulator, called as those of a library."""

    def __init__(self, emulator: str, program: Path) -> None:
        self._process = subprocess.Popen(
            [emulator, "-cpu", "max", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        (length,) = struct.unpack("=q", self._read(8))
        self.family = self._read(length)

    def __getattr__(self, name: str) -> Any:
        if name == "m3_vector_family":
            return _Constant(self.family)
        return lambda *arguments: self._call(name, arguments)

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(count)
        assert len(found) == count, f"the emulated kernels ended: {self._process.wait()}"
        return found

    def _call(self, name: str, arguments: tuple[Any, ...]) -> int:
        *given, bad = arguments
        message = [struct.pack("=q", len(name)), name.encode(), struct.pack("=q", len(given))]
        memories: list[tuple[int, bytes]] = []
        for argument in given:
            array = getattr(argument, "_obj", None)
            if argument is None:
                message.append(b"N")
            elif array is not None:
                memory = ctypes.string_at(array.data, _span(array)) if array.data else b""
                memories.append((array.data, memory))
                message += [b"A", bytes(array), struct.pack("=q", len(memory)), memory]
            elif isinstance(argument, ctypes.c_float):
                message += [b"F", struct.pack("=f", argument.value)]
            else:
                message += [b"I", struct.pack("=q", argument.value)]
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(message))
        self._process.stdin.flush()
        status, bad._obj.value = struct.unpack("=qq", self._read(16))
        for address, before in memories:
            _write_changes(address, before, self._read(len(before)))
        return status


@dataclass
class _Constant:
    value: bytes
    restype: Any = None

    def __call__(self) -> bytes:
        return self.value


def _span(array: native_build.Array) -> int:
    """Bytes from an array's first element to the end of its last one."""
    sizes = {0: 4, 1: 2, 2: 2, 3: 4, 4: 8, 5: 1, 6: 1}
    last = 0
    dimensions = 0
    # dimensions that a tensor has not are zero
    for size, stride in zip(array.size, array.stride, strict=True):
        if size == 0 and stride == 0:
            break
        if size == 0:
            return 0
        dimensions += 1
        last += (size - 1) * stride
    return (last + 1) * sizes[array.dtype] if dimensions else 0


def _write_changes(address: int, before: bytes, after: bytes) -> None:
    """Arrays may lie between one another: only what a kernel wrote goes back."""
    if before == after:
        return
    old, new = (numpy.frombuffer(memory, numpy.uint8) for memory in (before, after))
    changed = numpy.flatnonzero(old != new)
    memory: Any = (ctypes.c_uint8 * len(before)).from_address(address)
    there = numpy.frombuffer(memory, numpy.uint8)
    there[changed] = new[changed]


if VARIABLE in os.environ:
    native_build.library = library
