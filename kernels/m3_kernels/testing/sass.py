"""What the machine code of a kernel says about its loops, read from a disassembly.

Every instruction since sm_70 carries control bits: for how many cycles its warp then stalls, which
of six scoreboards it raises, and which of them it waits for. From these one warp's walk through the
code can be timed with latencies assumed for what runs in units of its own. Such cycles are a model
of one warp that nothing disturbs, not a measurement.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

# Cycles until the result is there, for units without a fixed latency: microbenchmarks published
# for sm_80 and sm_90. A load is one that the L2 cache answers.
LATENCY = {
    **dict.fromkeys(("LDG", "LD", "LDGDEPBAR"), 290),
    **dict.fromkeys(("ATOMG", "ATOM", "RED"), 350),
    **dict.fromkeys(("MEMBAR",), 300),
    **dict.fromkeys(("LDC", "HGMMA", "IGMMA", "QGMMA"), 40),
    **dict.fromkeys(("LDS", "LDSM", "BAR", "SYNCS", "ULDC", "CCTL"), 30),
    **dict.fromkeys(("SHFL", "REDUX", "CREDUX", "MUFU", "F2F", "I2F", "F2I", "FRND"), 24),
}
OTHER_LATENCY = 20
# Until a store's or load's operands have been read.
OPERANDS_READ = 20
# A barrier holds its warp whatever comes behind it.
BARRIER = 30

# 16 lanes a cycle on an SM, where ordinary instructions have 128.
CONVERSIONS = ("F2F", "I2F", "F2I", "I2I", "FRND")
PRODUCTS = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
SHUFFLES = ("SHFL", "REDUX", "CREDUX")
LOADS = ("LDG", "LD")

# Loops below this wait for something: a barrier in shared memory, a slow path of a warp.
LEAST_LOOP = 12


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    name : without modifiers, "HGMMA"
    full_name : with them, "HGMMA.64x32x16.F32.BF16"
    guarded : runs under a predicate
    target : label of a branch, "" for others
    stall : cycles until the warp's next instruction
    raises : scoreboard raised until the result is there, 7 for none
    reads : scoreboard raised until the operands are read, 7 for none
    waits : bit mask of scoreboards
    """

    name: str
    full_name: str
    guarded: bool
    target: str
    stall: int
    raises: int
    reads: int
    waits: int


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes
    ----------
    instructions : of one turn, for each warp
    products : instructions for tensor cores
    conversions : instructions of the narrow conversion unit
    barriers : of the whole program
    shuffles : between lanes, warp reductions among them
    awaited_loads : loads from global memory whose result the same turn waits for
    period : cycles of a turn, for one warp alone
    """

    instructions: int
    products: int
    conversions: int
    barriers: int
    shuffles: int
    awaited_loads: int
    period: int


@dataclass(frozen=True)
class Timeline:
    """Figures of a kernel's code.

    Attributes
    ----------
    loops : innermost ones in the order of the code
    hot : place in `loops` of the one that works on whole tiles: most products, then the shortest;
        the longest where nothing is multiplied. -1 without loops
    before, after : cycles from the start to the hot loop and from there to an end, on the way of
        fewest instructions; without loops all of it is before
    """

    loops: tuple[Loop, ...]
    hot: int
    before: int
    after: int


NO_LOOPS = Timeline((), -1, 0, 0)


def read(disassembly: str) -> Timeline:
    """Figures of what `nvdisasm -c -hex` prints of one kernel.

    Raises
    ------
    ValueError : the text holds no instruction with its control bits
    """
    code = Code.parse(disassembly)
    bodies = code.innermost_loops()
    loops = tuple(_figures([code.instructions[i] for i in body]) for body in bodies)
    if not loops:
        way = code.shortest(0, None, early=False)
        return Timeline((), -1, elapsed([code.instructions[i] for i in way]), 0)
    most = max(loop.products for loop in loops)
    places = [place for place, loop in enumerate(loops) if loop.products == most]
    choose = min if most else max
    hot = choose(places, key=lambda place: loops[place].instructions)
    before = code.shortest(0, bodies[hot][0])
    after = code.shortest(bodies[hot][0], None)[1:]
    # what is shared with the loop itself belongs to it
    inside = set(bodies[hot])
    return Timeline(
        loops,
        hot,
        elapsed([code.instructions[i] for i in before[:-1]]),
        elapsed([code.instructions[i] for i in after if i not in inside]),
    )


def elapsed(way: Iterable[Instruction], *, boards: list[int] | None = None, start: int = 0) -> int:
    """The cycle at which one warp that began at `start` has issued the instructions.

    Parameters
    ----------
    boards : when each scoreboard falls; changed in place
    """
    boards = [0] * 6 if boards is None else boards
    now = start
    for one in way:
        waited = [boards[board] for board in range(6) if one.waits >> board & 1]
        now = max(now, *waited) if waited else now
        if one.raises < 6:
            done = now + LATENCY.get(one.name, OTHER_LATENCY)
            boards[one.raises] = max(boards[one.raises], done)
        if one.reads < 6:
            boards[one.reads] = max(boards[one.reads], now + OPERANDS_READ)
        now += max(1, one.stall, BARRIER if one.name == "BAR" else 0)
    return now


def _figures(body: Sequence[Instruction]) -> Loop:
    def count(names: Iterable[str]) -> int:
        return sum(one.name in names for one in body)

    boards, ends = [0] * 6, [0]
    for _ in range(4):
        ends.append(elapsed(body, boards=boards, start=ends[-1]))
    return Loop(
        instructions=len(body),
        products=count(PRODUCTS),
        conversions=count(CONVERSIONS),
        barriers=count(("BAR",)),
        shuffles=count(SHUFFLES),
        awaited_loads=sum(
            any(later.waits >> one.raises & 1 for later in body[place + 1 :])
            for place, one in enumerate(body)
            if one.name in LOADS and one.raises < 6
        ),
        period=ends[-1] - ends[-2],
    )


_LINE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>\S.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*\n"
    r"\s*/\* 0x(?P<control>[0-9a-f]{16}) \*/|^\s*(?P<label>\.L_x_\d+):",
    re.M,
)
_TEXT = re.compile(r"(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z]\w*)(?P<modifiers>\S*)(?P<rest>.*)")


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel, and where its labels stand."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @staticmethod
    def parse(disassembly: str) -> Code:
        """As `read`."""
        found: list[Instruction] = []
        labels = {}
        for line in _LINE.finditer(disassembly):
            if line["label"]:
                labels[line["label"]] = len(found)
                continue
            text = _TEXT.match(line["text"])
            if text is None:
                raise ValueError(f"not an instruction: {line['text']!r}")
            control = int(line["control"], 16)
            label = re.search(r"\.L_x_\d+", text["rest"])
            found.append(
                Instruction(
                    name=text["name"],
                    full_name=text["name"] + text["modifiers"],
                    guarded=text["guard"] is not None or ".DIV" in text["modifiers"],
                    target=label[0] if label and text["name"] == "BRA" else "",
                    stall=control >> 41 & 15,
                    raises=control >> 46 & 7,
                    reads=control >> 49 & 7,
                    waits=control >> 52 & 63,
                )
            )
        if not found:
            raise ValueError("no instruction in what nvdisasm printed")
        return Code(tuple(found), labels)

    @cached_property
    def starts(self) -> list[int]:
        """First instructions of the basic blocks, rising."""
        ends = {i + 1 for i, one in enumerate(self.instructions) if one.target or _leaves(one)}
        found = {0, *self.labels.values(), *ends}
        return sorted(place for place in found if place < len(self.instructions))

    @cached_property
    def following(self) -> dict[int, list[int]]:
        """Blocks that may come after each block, by their first instructions."""
        found = {}
        for number, start in enumerate(self.starts):
            end = self._end(number)
            last = self.instructions[end - 1]
            after = []
            if last.target:
                after.append(self.labels[last.target])
            falls = last.guarded or not (last.target or _leaves(last))
            if falls and end < len(self.instructions):
                after.append(end)
            found[start] = after
        return found

    def _end(self, number: int) -> int:
        later = self.starts[number + 1 : number + 2]
        return later[0] if later else len(self.instructions)

    def block(self, start: int) -> range:
        """The instructions of a block."""
        return range(start, self._end(self.starts.index(start)))

    def innermost_loops(self) -> list[list[int]]:
        """Instructions of each loop that holds no other, in the order of the code.

        Only what every way into the loop passes counts as its head, so that slow paths laid behind
        the end of the code make no loops. Loops that only wait are left out.
        """
        bodies: dict[int, set[int]] = {}
        for block, after in self.following.items():
            for head in after:
                if head in self._dominators.get(block, ()):
                    bodies.setdefault(head, set()).update(self._natural_loop(head, block))
        lengths = {head: sum(len(self.block(b)) for b in body) for head, body in bodies.items()}
        real = {head: body for head, body in bodies.items() if lengths[head] >= LEAST_LOOP}
        return [
            [i for start in sorted(body) for i in self.block(start)]
            for head, body in sorted(real.items())
            if not any(other != head and other in body for other in real)
        ]

    @cached_property
    def _preceding(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {start: [] for start in self.starts}
        for block, after in self.following.items():
            for later in after:
                found[later].append(block)
        return found

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Of each block that can be reached: blocks that every way to it passes, itself too."""
        reached = {0}
        waiting = [0]
        while waiting:
            fresh = [block for block in self.following[waiting.pop()] if block not in reached]
            reached.update(fresh)
            waiting += fresh
        found = {block: set(reached) for block in reached} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in sorted(reached - {0}):
                before = [found[b] for b in self._preceding[block] if b in reached]
                now = set.intersection(*before) | {block}
                changed |= now != found[block]
                found[block] = now
        return found

    def _natural_loop(self, head: int, latch: int) -> set[int]:
        body, waiting = {head, latch}, [latch] if latch != head else []
        while waiting:
            for block in self._preceding[waiting.pop()]:
                if block not in body and block in self._dominators:
                    body.add(block)
                    waiting.append(block)
        return body

    def shortest(self, start: int, goal: int | None, *, early: bool = True) -> list[int]:
        """Instructions from a block to another's first one, or to an end of the kernel.

        `early` counts ends that are taken under a condition.
        """
        waiting: list[tuple[int, int, tuple[int, ...]]] = [(0, start, ())]
        done = set()
        while waiting:
            cost, block, way = heapq.heappop(waiting)
            if block in done:
                continue
            done.add(block)
            if block == goal and way:
                return [*(i for start in way for i in self.block(start)), block]
            way = (*way, block)
            last = self.instructions[self.block(block)[-1]]
            if goal is None and _leaves(last) and (early or not last.guarded):
                return [i for start in way for i in self.block(start)]
            for later in self.following[block]:
                heapq.heappush(waiting, (cost + len(self.block(block)), later, way))
        return []


def _leaves(one: Instruction) -> bool:
    return one.name in ("EXIT", "RET", "BRX")
