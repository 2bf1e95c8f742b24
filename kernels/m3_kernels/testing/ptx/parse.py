"""PTX as text into a kernel of instructions: as much of the language as Triton writes.

Registers of inner scopes (of inline assembly) get names of their own. Debug sections are left out;
what remains of them is the source line of every instruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Register:
    """A register, by its name within the kernel; special ones (%tid.x) too."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number as bits (two's complement, IEEE), to be cut to what an instruction takes.

    Attributes
    ----------
    bits : of an integer its value; of a float (0f..., 0d...) its bits
    size : of a float 4 or 8 bytes; 0 for integers
    """

    bits: int
    size: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable in shared memory, for its address."""

    name: str


@dataclass(frozen=True)
class Sink:
    """`_`: a result that nobody wants."""


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or `a|b` of results."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | Immediate
    offset: int


Operand = Register | Immediate | Symbol | Sink | Vector | Address


@dataclass(frozen=True)
class Guard:
    """`@p` or `@!p`."""

    register: Register
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    number : its place in the kernel
    name, modifiers : "ld" and ("global", "v4", "b32")
    target : label of a branch, "" for others
    line : of the source it was made from, "triton.py:33"
    text : as it was written
    """

    number: int
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None = None
    target: str = ""
    line: str = ""
    text: str = ""

    def __str__(self) -> str:
        return f"`{self.text}` ({self.line})" if self.line else f"`{self.text}`"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel and its type, "u64"."""

    name: str
    type: str


@dataclass(frozen=True)
class Kernel:
    """An entry of a module.

    Attributes
    ----------
    threads : of a program
    registers : types by name
    shared : where variables of shared memory begin; that of dynamic size is last
    shared_bytes : of those with a size
    labels : instruction that each stands before
    """

    name: str
    parameters: tuple[Parameter, ...]
    threads: int
    registers: dict[str, str] = field(repr=False)
    shared: dict[str, int]
    shared_bytes: int
    instructions: tuple[Instruction, ...] = field(repr=False)
    labels: dict[str, int] = field(repr=False)


_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<rest>[^{]*)\{")
_SHARED = re.compile(
    r"\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?\.b8\s+(?P<name>[\w$]+)\[(?P<size>\d*)\]"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*")
_LABEL = re.compile(r"([$\w.]+):(?!:)")
_STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%?\w+)\s+)?(?P<code>[\w.:]+)\s*(?P<rest>.*)")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def parse(text: str) -> Kernel:
    """The one kernel of a module.

    Raises
    ------
    ValueError : something that is not understood, in the words of the text
    """
    text = re.sub(r"//[^\n]*", "", text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("no .entry in the PTX")
    shared, size = _shared(text)
    code = _Code(
        files={number: PurePosixPath(path).name for number, path in _FILE.findall(text)},
        shared=shared,
    )
    code.read(text, entry.end())
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry["rest"])
    if threads is None:
        raise ValueError("no .reqntid in the PTX")
    return Kernel(
        name=entry["name"],
        parameters=tuple(_parameters(entry["parameters"])),
        threads=int(threads[1]),
        registers=code.registers,
        shared=shared,
        shared_bytes=size,
        instructions=tuple(code.instructions),
        labels=code.labels,
    )


def _parameters(text: str) -> Iterator[Parameter]:
    for line in filter(str.strip, text.split(",")):
        words = line.split()
        yield Parameter(words[-1], words[1].removeprefix("."))


def _shared(text: str) -> tuple[dict[str, int], int]:
    """Where variables lie, and how many bytes those of known size take."""
    found = list(_SHARED.finditer(text))
    places, end = {}, 0
    for one in sorted(found, key=lambda one: not one["size"]):
        align = int(one["align"] or 1)
        end = -(-end // align) * align
        places[one["name"]] = end
        end += int(one["size"] or 0)
    return places, end


class _Code:
    """The body of a kernel while it is read."""

    def __init__(self, *, files: dict[str, str], shared: dict[str, int]) -> None:
        self.files, self.shared = files, shared
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.line = ""

    def read(self, text: str, place: int) -> None:
        """From behind the opening brace to the closing one."""
        while self.scopes:
            while text[place].isspace():
                place += 1
            if text[place] == "{":
                self.scopes.append({})
                self.scope_count += 1
                place += 1
            elif text[place] == "}":
                self.scopes.pop()
                place += 1
            elif location := _LOC.match(text, place):
                self.line = f"{self.files.get(location[1], '?')}:{location[2]}"
                place = location.end()
            elif label := _LABEL.match(text, place):
                self.labels[label[1]] = len(self.instructions)
                place = label.end()
            else:
                end = text.index(";", place)
                self._statement(" ".join(text[place:end].split()))
                place = end + 1

    def _statement(self, text: str) -> None:
        if register := _REG.fullmatch(text):
            for name in register[2].split(","):
                self._declare(name.strip(), register[1])
            return
        if text.startswith((".pragma", ".shared")):
            return
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise ValueError(f"not understood: {text!r}")
        name, *modifiers = found["code"].split(".")
        guard = None
        if found["guard"]:
            guard = Guard(self._register(found["guard"]), bool(found["negated"]))
        rest = found["rest"].strip()
        target = rest if name == "bra" else ""
        operands = () if target else tuple(self._operand(part) for part in _split(rest))
        number = len(self.instructions)
        self.instructions.append(
            Instruction(number, name, tuple(modifiers), operands, guard, target, self.line, text)
        )

    def _declare(self, text: str, type_: str) -> None:
        """`a<4>` is a0 to a3."""
        many = re.fullmatch(r"([%$\w]+)<(\d+)>", text)
        names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [text]
        inner = f"@{self.scope_count}" if len(self.scopes) > 1 else ""
        for name in names:
            self.scopes[-1][name] = name + inner
            self.registers[name + inner] = type_

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return Register(scope[name])
        if name.startswith("%"):
            return Register(name)
        raise ValueError(f"{name!r} is no register of the kernel")

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self._operand(part) for part in text.split("|")))
        if text.startswith("["):
            found = _ADDRESS.fullmatch(text)
            if found is None:
                raise ValueError(f"not an address: {text!r}")
            return Address(self._base(found[1]), int(found[2] or "0", 0))
        base = self._base(text)
        return base

    def _base(self, text: str) -> Register | Symbol | Immediate:
        if text[0].isdigit() or text[0] == "-":
            return _immediate(text)
        if text in self.shared or "_param_" in text:
            return Symbol(text)
        return self._register(text)


def _immediate(text: str) -> Immediate:
    if text[:2] in ("0f", "0F"):
        return Immediate(int(text[2:], 16), 4)
    if text[:2] in ("0d", "0D"):
        return Immediate(int(text[2:], 16), 8)
    return Immediate(int(text.rstrip("U"), 0))


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]
