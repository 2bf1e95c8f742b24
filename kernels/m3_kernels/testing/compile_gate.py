"""Compiles every Triton kernel for every GPU family, without a GPU, and judges the machine code.

`m3_kernels.testing.production` makes calls of meta tensors as a server does and asks the ops what
they launch; each launch has a budget of registers and shared memory and the instructions it must
contain. Spilled registers are a fault everywhere.

    python -P -m m3_kernels.testing.compile_gate             # judge all; exit code 1 on a fault
    python -P -m m3_kernels.testing.compile_gate --arch 90 --only index_topk --json
    python -P -m m3_kernels.testing.compile_gate --markdown  # what docs/kernels-compiled*.md hold

Most of a compile is spent behind Triton's front end. `--known FILE` names an earlier `--json`: a
kernel whose fingerprint stands there is judged by the figures beside it, any other is compiled. The
front end takes most of the rest, so where no source has changed fingerprints are taken from there.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from m3_kernels.launch import Launch
from m3_kernels.testing import sass

ARCHS = (80, 89, 90, 100, 120)
OPS = (
    "work_plan",
    "page_table",
    "index_topk",
    "sparse_attention",
    "cache_store",
    "norm_rope_store",
    "mxfp8_linear",
)

# Shared memory one program may use, bytes: the CUDA programming guide's table of capabilities.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# What the programs of one multiprocessor share, from the same table: bytes of shared memory, of
# which each takes 1 KB beside its own, and warps. Registers are 65,536, given to warps by 256.
SHARED_PER_SM = {80: 167936, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAMS_PER_SM = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}

# What the table counts: tensor cores (warp, warp group, Blackwell's own memory), TMA, async copies.
INSTRUCTIONS = ("HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "LDGSTS")
SPILLS = ("LDL", "STL")

# Chips whose loops are read and have budgets: those that the time model knows.
LOOPS_READ = (90,)

# Of a kernel in a chain of dependent launches: first the wait, before any access to memory.
DEPENDENCY = ("wait", "launch_dependents")


@dataclass(frozen=True)
class LoopBudget:
    """What the hot loop of a kernel may cost; names as in `sass.Loop`.

    Attributes
    ----------
    duplicates : how often the same part of a product may be computed
    programs_per_sm : at least so many programs must fit on a multiprocessor
    """

    instructions: int
    period: int
    conversions: int = 0
    barriers: int = 0
    shuffles: int = 0
    awaited_loads: int = 0
    duplicates: int = 1
    programs_per_sm: int = 1


@dataclass(frozen=True)
class Variant:
    """One launch of serving, and what its machine code must keep to.

    Attributes
    ----------
    name : readable, unique within the op and chip
    launch : as an op's `launches` yields it for meta tensors
    registers : most registers a thread may use
    shared : most bytes of shared memory a program may use
    needs : instructions (beginnings of their names) the machine code must contain
    loop : of the hot loop; None for kernels that have none, or run once per step
    """

    name: str
    launch: Launch
    registers: int
    shared: int
    needs: tuple[str, ...] = ()
    loop: LoopBudget | None = None

    @property
    def dependent(self) -> bool:
        """Whether it waits for the launch before it and lets the next one begin (PDL)."""
        return bool(self.launch.arguments.get("PDL", False))


@dataclass(frozen=True)
class Compiled:
    """Figures of the machine code.

    Attributes
    ----------
    registers, stack : per thread; stack in bytes
    shared : bytes per program, static and dynamic
    warps : per program
    instructions : how many of each of INSTRUCTIONS and SPILLS the code holds
    dependency : the PTX instructions of grid dependency, in their order
    timeline : loops of the machine code, and cycles before and after the hot one; on the chips of
        LOOPS_READ alone, as is
    duplicates : how many times a part of a product is computed at most: more than once where warps
        outnumber the parts
    """

    registers: int
    stack: int
    shared: int
    warps: int
    instructions: Mapping[str, int] = field(default_factory=dict)
    dependency: tuple[str, ...] = ()
    timeline: sass.Timeline = sass.NO_LOOPS
    duplicates: int = 1

    def programs_per_sm(self, arch: int) -> int:
        """How many programs fit on a multiprocessor at a time."""
        registers = self.warps * (-(-max(self.registers, 1) * 32 // 256) * 256)
        return min(
            PROGRAMS_PER_SM[arch],
            WARPS_PER_SM[arch] // self.warps,
            65536 // registers,
            SHARED_PER_SM[arch] // (self.shared + 1024),
        )


def fingerprint(variant: Variant, arch: int) -> str:
    """Hash of all that decides a variant's machine code, so equal hashes mean equal code.

    That is the IR of Triton's front end without its source lines, the options, the chip, and the
    releases of Triton and of the assembler it brings along.

    Raises
    ------
    RuntimeError, TypeError : as `compile_variant`
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    source, given = source_of(variant.launch, arch)
    target = GPUTarget("cuda", arch, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options(given | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    decisive = (module.str_nodebug(), *_behind_the_front_end(given, arch))
    return hashlib.sha256(repr(decisive).encode()).hexdigest()


def sources(variant: Variant, arch: int) -> str:
    """Hash of what `fingerprint` is made from, so equal hashes mean equal fingerprints.

    That is every module of the kernels, without comments and lines, and the launch as Triton's
    front end is given it. Far more launches differ in this than in code, and so do those hashed by
    another release of Python.
    """
    source, given = source_of(variant.launch, arch)
    decisive = (
        _modules(),
        source.fn.__module__ + source.fn.__qualname__,
        sorted(source.signature.items()),
        sorted((at, str(value)) for at, value in source.constants.items()),
        sorted((at, str(value)) for at, value in source.attrs.items()),
        *_behind_the_front_end(given, arch),
    )
    return hashlib.sha256(repr(decisive).encode()).hexdigest()


def _behind_the_front_end(given: Mapping[str, Any], arch: int) -> tuple[Any, ...]:
    """What decides the machine code that is made of Triton's IR."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    return (
        sorted(given.items()),
        arch,
        triton.__version__,
        get_ptxas_version(arch),
    )


@cache
def _modules() -> str:
    """Hash of all modules that kernels may be written in."""
    root = Path(__file__).parents[1]
    return syntax(path for path in sorted(root.rglob("*.py")) if "testing" not in path.parts)


def syntax(files: Iterable[Path]) -> str:
    """Hash of what Python files say, without comments and lines."""
    trees = [ast.dump(ast.parse(path.read_bytes())) for path in files]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile for a chip (major * 10 + minor) that need not be here, and read the result.

    Raises
    ------
    RuntimeError : Triton runs in interpreter mode in this process
    TypeError : the launch leaves out a parameter of the kernel
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(variant.launch, arch)
    built: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    read = _read_cubin(
        built.asm["cubin"], shared=built.metadata.shared, warps=built.metadata.num_warps
    )
    read = dataclasses.replace(read, dependency=dependency(built.asm["ptx"]))
    if arch not in LOOPS_READ:
        return read
    code = _printed(built.asm["cubin"], "nvdisasm", "-c", "-hex")
    return dataclasses.replace(
        read, timeline=sass.read(code), duplicates=duplicates(built.asm["ttgir"])
    )


def source_of(launch: Launch, arch: int) -> tuple[Any, dict[str, Any]]:
    """What Triton itself makes of a launch: the kernel with types and constants, and options.

    Raises
    ------
    RuntimeError, TypeError : as `compile_variant`
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    kernel, given = launch.kernel, dict(launch.arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        name = kernel.__name__
        raise RuntimeError(f"{name}: nothing compiles with TRITON_INTERPRET=1; unset it")
    backend: Any = make_backend(GPUTarget("cuda", arch, 32))
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**given)
    _, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialisation, options
    )
    return ASTSource(kernel, signature, constants, attributes), _of_code(options)


def _of_code(options: Mapping[str, Any]) -> dict[str, Any]:
    """Triton's options that decide machine code; how a launch follows another is not among them."""
    return {name: value for name, value in options.items() if name != "launch_pdl"}


def faults(variant: Variant, compiled: Compiled, arch: int) -> list[str]:
    """What is wrong with the machine code of a variant, one line each; empty if nothing is."""
    found = []
    spills = sum(compiled.instructions[name] for name in SPILLS)
    if compiled.stack or spills:
        found.append(f"spills: {compiled.stack} bytes of stack, {spills} loads and stores")
    if compiled.registers > variant.registers:
        found.append(f"{compiled.registers} registers, budget {variant.registers}")
    shared = min(variant.shared, SHARED_LIMIT[arch])
    if compiled.shared > shared:
        found.append(f"{compiled.shared} bytes of shared memory, budget {shared}")
    found += _loop_faults(variant.loop, compiled, arch) if variant.loop else []
    found += [f"no {name}" for name in variant.needs if not compiled.instructions[name]]
    wanted = DEPENDENCY if variant.dependent else ()
    if compiled.dependency != wanted:
        found.append(f"grid dependency {compiled.dependency}, not {wanted}")
    return [f"sm_{arch} {variant.name}: {line}" for line in found]


def _loop_faults(budget: LoopBudget, compiled: Compiled, arch: int) -> list[str]:
    timeline = compiled.timeline
    if timeline.hot < 0:
        return ["no loop"]
    loop = timeline.loops[timeline.hot]
    figures = dataclasses.asdict(loop) | {"duplicates": compiled.duplicates}
    allowed = dataclasses.asdict(budget)
    least = allowed.pop("programs_per_sm")
    found = [
        f"hot loop: {name.replace('_', ' ')} {figures[name]}, budget {most}"
        for name, most in allowed.items()
        if figures[name] > most
    ]
    if (programs := compiled.programs_per_sm(arch)) < least:
        found.append(f"{programs} programs on a multiprocessor, not {least}")
    return found


def op_variants(op: str, arch: int) -> Sequence[Variant]:
    """What an op launches on a chip, at the configurations chosen for it."""
    return list(importlib.import_module(f"m3_kernels.testing.production.{op}").variants(arch))


def _read_cubin(cubin: bytes, *, shared: int, warps: int) -> Compiled:
    usage = _printed(cubin, "cuobjdump", "--dump-resource-usage")
    code = _printed(cubin, "nvdisasm", "-c")
    opcodes = Counter(
        re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?\w+\s+)?([A-Z][A-Z0-9_]+)", code, re.M)
    )
    counts = {
        name: sum(count for opcode, count in opcodes.items() if opcode.startswith(name))
        for name in (*INSTRUCTIONS, *SPILLS)
    }
    return Compiled(
        registers=int(_found(r"REG:(\d+)", usage)),
        stack=int(_found(r"STACK:(\d+)", usage)),
        shared=shared,
        warps=warps,
        instructions=counts,
    )


def duplicates(ttgir: str) -> int:
    """How many times a part of a product is computed at most.

    Warps that outnumber the parts of a tile compute the same one. Blackwell's own products are
    started by one thread, and by the front end cut into no warps.
    """
    most = 1
    layout = r"^(#\w+) = #ttg\.nvidia_mma<\{.*warpsPerCTA = \[(.*?)\].*instrShape = \[(.*?)\]"
    for name, warps, instruction in re.findall(layout, ttgir, re.M):
        covered = [
            int(w) * int(size)
            for w, size in zip(warps.split(","), instruction.split(",")[:2], strict=True)
        ]
        shapes = re.findall(rf"dot .*-> tensor<(\d+)x(\d+)x\w+, {name}>", ttgir)
        for shape in shapes:
            parts = [max(1, c // int(size)) for c, size in zip(covered, shape, strict=True)]
            most = max(most, parts[0] * parts[1])
    return most


def dependency(ptx: str) -> tuple[str, ...]:
    """A kernel's instructions of grid dependency; memory touched before them shows as "access"."""
    found = re.findall(
        r"^\s*(?:@!?%p\d+\s+)?(griddepcontrol\.\w+|(?:ld|st|atom)\.global)", ptx, re.M
    )
    names = ["access" if "global" in name else name.partition(".")[2] for name in found]
    last = max((place for place, name in enumerate(names) if name != "access"), default=-1)
    return tuple(names[: last + 1])


def _printed(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _tool(name: str) -> Path:
    """A binary that Triton's wheel brings along."""
    import triton.backends.nvidia

    return Path(str(triton.backends.nvidia.__file__)).parent / "bin" / name


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no {pattern!r}: {text}")
    return match.group(1)


@dataclass(frozen=True)
class Judged:
    """A variant on a chip, its hashes, and the figures of its machine code."""

    op: str
    arch: int
    variant: Variant
    sources: str
    fingerprint: str
    compiled: Compiled
    was_known: bool

    def report(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "op": self.op,
            "variant": self.variant.name,
            "arch": self.arch,
            "sources": self.sources,
            "fingerprint": self.fingerprint,
            **dataclasses.asdict(self.compiled),
        }


@dataclass(frozen=True)
class Known:
    """What an earlier run found.

    Attributes
    ----------
    fingerprints : by the hash of the sources
    figures : by fingerprint
    """

    fingerprints: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Compiled] = field(default_factory=dict)

    def fingerprint(self, variant: Variant, arch: int) -> str:
        """That of these sources if it is known, else of what the front end makes of them now."""
        return self.fingerprints.get(sources(variant, arch)) or fingerprint(variant, arch)


def read_known(path: Path) -> Known:
    """What `--json` printed; nothing from an empty file."""
    names = [field.name for field in dataclasses.fields(Compiled)]
    fingerprints, known = {}, {}
    text = path.read_text(encoding="utf-8")
    for kernel in json.loads(text)["kernels"] if text else ():
        fingerprints[kernel["sources"]] = kernel["fingerprint"]
        figures = {name: kernel[name] for name in names}
        figures["dependency"] = tuple(figures["dependency"])
        timeline = dict(figures["timeline"])
        timeline["loops"] = tuple(sass.Loop(**loop) for loop in timeline["loops"])
        figures["timeline"] = sass.Timeline(**timeline)
        known[kernel["fingerprint"]] = Compiled(**figures)
    return Known(fingerprints, known)


def judge_chip(arch: int, ops: Sequence[str], known: Known, *, apart: bool) -> list[Judged]:
    """Figures of all variants: those of equal machine code where they are known, else compiled now.

    Parameters
    ----------
    apart : compile in a process of its own. Triton 3.6 takes its conversions of fp8 from the first
        chip that a process compiles for, which a server never has two of

    Raises
    ------
    RuntimeError : the process of its own failed
    """
    found = [(op, v, known.fingerprint(v, arch)) for op in ops for v in op_variants(op, arch)]
    made = dict(known.figures)
    for op in ops if apart else ():
        if any(key not in made for other, _, key in found if other == op):
            made |= _compiled_apart(arch, op)
    return [
        Judged(
            *(op, arch, variant, sources(variant, arch), key),
            made[key] if key in made else compile_variant(variant, arch),
            was_known=key in known.figures,
        )
        for op, variant, key in found
    ]


def _compiled_apart(arch: int, op: str) -> Mapping[str, Compiled]:
    """Figures of an op's kernels by fingerprint; whoever asked judges them."""
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as file:
        command = (sys.executable, "-P", "-W", "ignore", "-m", "m3_kernels.testing.compile_gate")
        done = subprocess.run(
            [*command, "--json", "--arch", str(arch), "--only", op],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"sm_{arch} {op} was not compiled: {done.stderr[-2000:]}")
        return read_known(Path(file.name)).figures


def _markdown(results: Sequence[Judged]) -> str:
    import triton

    lines = [
        "# Machine code of the Triton kernels",
        "",
        "Generated by `make kernels-table`; do not edit. Every kernel at the configuration which",
        "`m3_kernels.tuning` chooses for the chip, for the geometry of MiniMax-M3, compiled by",
        f"Triton {triton.__version__} without a GPU. Registers and stack are per thread, shared",
        "memory per program. HMMA and QMMA are tensor cores fed by a warp, HGMMA by a warp group",
        "(sm_90), UTCHMMA by tensor memory (sm_100); UTMALDG is a TMA load, LDGSTS an asynchronous",
        "copy. These are counts in the code, not times: nothing here was measured on a GPU.",
        "",
        "| op | kernel | chip | warps | registers | shared KB | stack | instructions |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for made in sorted(results, key=lambda r: (OPS.index(r.op), r.variant.name)):
        compiled = made.compiled
        counts = ", ".join(
            f"{name} {compiled.instructions[name]}"
            for name in INSTRUCTIONS
            if compiled.instructions[name]
        )
        lines.append(
            f"| {made.op} | {made.variant.name} | sm_{made.arch} | {compiled.warps} "
            f"| {compiled.registers} | {compiled.shared / 1024:.1f} | {compiled.stack} | {counts} |"
        )
    return "\n".join([*lines, "", *_loops_markdown(results)])


def _loops_markdown(results: Sequence[Judged]) -> list[str]:
    """The table of hot loops."""
    lines = [
        "## Hot loops",
        "",
        "Of the loop that works on whole tiles, per turn and warp: instructions; those of them for",
        "tensor cores and for the narrow conversion unit; barriers of the program; shuffles; loads",
        "that the same turn waits for. Duplicates: how often a part of a product is computed.",
        "Programs: as many as fit on a multiprocessor. Cycles of a turn, of the way to the loop,",
        "and of the way from it to an end come from the code's control bits, for one warp alone",
        "and with assumed latencies (`m3_kernels/testing/sass.py`): a model, no measurement.",
        "",
        "| op | kernel | chip | instructions | products | conversions | barriers | shuffles "
        "| awaited loads | duplicates | programs | cycles | before | after |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for made in sorted(results, key=lambda r: (OPS.index(r.op), r.variant.name)):
        compiled, timeline = made.compiled, made.compiled.timeline
        if timeline.hot < 0:
            continue
        loop = timeline.loops[timeline.hot]
        cells = (
            *(made.op, made.variant.name, f"sm_{made.arch}", loop.instructions, loop.products),
            *(loop.conversions, loop.barriers, loop.shuffles, loop.awaited_loads),
            *(compiled.duplicates, compiled.programs_per_sm(made.arch)),
            *(loop.period, timeline.before, timeline.after),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; prints faults to stderr and returns 1 if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    parser.add_argument("--only", action="append", choices=OPS, metavar="OP")
    parser.add_argument("--known", type=Path, metavar="FILE", help="figures of an earlier --json")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="figures as JSON")
    output.add_argument(
        "--markdown", action="store_true", help="figures as docs/kernels-compiled*.md"
    )
    options = parser.parse_args(arguments)

    import triton

    known = read_known(options.known) if options.known else Known()
    ops = options.only or OPS
    archs = options.arch or ARCHS
    apart = len(archs) > 1
    results = [made for arch in archs for made in judge_chip(arch, ops, known, apart=apart)]
    found = [line for r in results for line in faults(r.variant, r.compiled, r.arch)]
    if options.json:
        report = {
            "triton": triton.__version__,
            "compiled": sum(not result.was_known for result in results),
            "kernels": [result.report() for result in results],
            "faults": found,
        }
        text = json.dumps(report, indent=1)
    elif options.markdown:
        text = _markdown(results)
    else:
        text = f"Triton {triton.__version__}: {len(results)} kernels judged, {len(found)} faults"
    sys.stdout.write(text + "\n")
    sys.stderr.write("".join(f"{line}\n" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
