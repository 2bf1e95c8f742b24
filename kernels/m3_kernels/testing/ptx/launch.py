"""Launches of our kernels, compiled for a chip that is not here and run on tensors of the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from m3_kernels import capability, tuning
from m3_kernels.launch import Launch
from m3_kernels.testing.compile_gate import source_of
from m3_kernels.testing.ptx.machine import BATCH_THREADS, Code, prepare, run
from m3_kernels.testing.ptx.memory import GlobalMemory
from m3_kernels.testing.ptx.parse import Kernel, parse

# Later chips have instructions that are not known here: products of warp groups, TMA.
ARCHS = (80, 89)

_SCALARS = {"fp32": np.float32, "fp64": np.float64, "i1": np.uint8, "u1": np.uint8}


@dataclass(frozen=True)
class Compiled:
    """What Triton makes of a launch.

    Attributes
    ----------
    shared : bytes of shared memory it is launched with
    """

    ptx: str
    shared: int


@dataclass
class Executed:
    """What was run.

    Attributes
    ----------
    kernels : names, one for each launch
    instructions : how often programs ran which instruction, "cp.async", "mma.sync"
    """

    kernels: list[str] = field(default_factory=list)
    instructions: Counter[str] = field(default_factory=Counter)


@contextmanager
def executed(
    *, arch: int = 80, seed: int = 0, batch_threads: int = BATCH_THREADS
) -> Iterator[Executed]:
    """Within: ops with backend="triton" run on tensors of the CPU as PTX, one launch after another.

    Parameters
    ----------
    arch : the chip that is compiled for, one of `ARCHS`
    seed : of the order of programs
    batch_threads : how many threads run at a time; 1 has programs run one after another

    Raises
    ------
    ValueError : the chip is none of those
    RuntimeError : kernels of this process are interpreted ones
    """
    import triton.language as tl
    from triton.runtime import jit

    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {ARCHS}; got {arch}")
    if not isinstance(tl.sort, jit.JITFunction):
        raise RuntimeError("nothing compiles with TRITON_INTERPRET=1; use a process without it")
    found = Executed()
    known: dict[str, tuple[Code, int]] = {}

    def launch(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if given or warmup:
            raise NotImplementedError("ptx: launches name their arguments, and are made")
        one = Launch(kernel, tuple(grid), named)
        key = key_of(one, arch)
        if key not in known:
            compiled = compile_launch(one, arch)
            known[key] = prepare(parse(compiled.ptx)), compiled.shared
        code, shared = known[key]
        found.kernels.append(code.kernel.name)
        found.instructions += execute(
            one, code, arch=arch, shared=shared, seed=seed, batch_threads=batch_threads
        )

    with (
        mock.patch.object(jit.JITFunction, "run", launch),
        mock.patch.object(tuning, "INTERPRETER_ARCH", arch),
        mock.patch.object(capability, "_interpreter_refusal", return_value=None),
    ):
        yield found


def key_of(launch: Launch, arch: int) -> str:
    """Equal for launches of the same machine code."""
    source, options = source_of(launch, arch)
    constants = {at: str(value) for at, value in source.constants.items()}
    return repr((source.fn.__name__, source.signature, constants, source.attrs, options))


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """The PTX of a launch; the assembler is left out."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    source, given = source_of(launch, arch)
    target = GPUTarget("cuda", arch, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options(given | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for name, stage in stages.items():
        if name != "cubin":
            module = stage(module, metadata)
    return Compiled(str(module), metadata["shared"])


def execute(
    launch: Launch,
    code: Code,
    *,
    arch: int,
    shared: int,
    seed: int = 0,
    batch_threads: int = BATCH_THREADS,
) -> Counter[str]:
    """Run a launch of a kernel that was compiled for it; more as in `machine.run`.

    Raises
    ------
    Fault : what the kernel must not do
    """
    source, _ = source_of(launch, arch)
    grid = (*launch.grid, 1, 1)
    values = [launch.arguments[name] for name in source.signature]
    bound = list(_bound(tuple(source.signature.values()), values))
    return run(
        code,
        grid=(grid[0], grid[1], grid[2]),
        parameters=_parameters(code.kernel, bound),
        memory=GlobalMemory(value for _, value in bound if isinstance(value, Tensor)),
        shared=shared,
        seed=seed,
        batch_threads=batch_threads,
    )


def _bound(types: tuple[Any, ...], values: Any) -> Iterator[tuple[str, Any]]:
    """Type and value of each argument that the compiled kernel takes, tuples taken apart."""
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _bound(type_, value)
        elif type_.startswith("tensordesc"):
            raise NotImplementedError("ptx: no chip of those known here has tensor descriptors")
        elif type_ != "constexpr":
            yield type_, value


def _parameters(kernel: Kernel, bound: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """What is launched, by the kernel's own names; Triton's scratch memory behind it is null."""
    found = {}
    for parameter, (type_, value) in zip(kernel.parameters, bound, strict=False):
        if isinstance(value, torch.Tensor):
            found[parameter.name] = np.uint64(value.data_ptr())
        elif type_ in _SCALARS:
            found[parameter.name] = _SCALARS[type_](value)
        else:
            size = int(type_[1:]) // 8
            found[parameter.name] = np.array(value).astype(f"u{size}")[()]
    if len(kernel.parameters) < len(bound):
        raise ValueError(
            f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(bound)}"
        )
    rest = kernel.parameters[len(bound) :]
    return found | {parameter.name: np.uint64(0) for parameter in rest}
