"""Reads a compiled program's text (`compiled.as_text()`): its collectives, and the copies of a decode loop's step.

A program is a list of computations, each a list of instructions; a decode loop is a while over blocks whose body has a
while over steps. It knows the text's grammar and nothing about models.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
REDUCTIONS = ("all-reduce", "reduce-scatter")
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "fsu" for bits in (8, 16, 32, 64)}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")
# What moves no array by itself.
_NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "iota")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERATION = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `fast`: in the chip's fast memory, not in HBM."""

    shape: tuple[int, ...]
    bytes: int
    fast: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Attributes:
    called: the computations that it runs.
    operands: the instructions that it reads.
    source: the operation of the Python program that it comes from, as far as the compiler says.
    """

    name: str
    kind: str
    results: tuple[Array, ...]
    called: tuple[str, ...]
    operands: tuple[str, ...]
    source: str
    text: str


class Program:
    """Attributes: `computations`, instructions by computation; `entry`, the name of the first. Of a decode loop:
    `loop`, the names of those within it; `step`, the one that is a step.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current, self.entry = [], None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(_instruction(line, *found.groups()))

    @functools.cached_property
    def _blocks(self) -> str:
        return self._largest_while(self.entry)

    @functools.cached_property
    def loop(self) -> set[str]:
        return self._reached(self._blocks)

    @functools.cached_property
    def step(self) -> str:
        return self._largest_while(self._blocks)

    def traffic(self, start: str | None = None) -> Counter[str]:
        """Bytes that arrive on a chip by its collectives, by kind, in one run of a computation, by default the program.

        Those in a loop count for each of its turns. By rings, of which each chip is one of n: an all-gather brings
        (n - 1) / n of its result, an all-reduce twice that, a reduce-scatter (n - 1) / n of what it reduces.
        """
        total, seen = Counter(), set()
        for name, times in self._runs(self.entry if start is None else start):
            # Written so where the chips' parts of a sum are scattered.
            scatters = "all-reduce-scatter" in name
            for i in self.computations[name]:
                kind = i.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                # An all-gather that runs beside products stands in each of them, with one channel.
                if "chain_id=" in i.text and (channel := _CHANNEL.search(i.text)):
                    if channel[1] in seen:
                        continue
                    seen.add(channel[1])
                kind = "reduce-scatter" if scatters else kind
                size, n = result_bytes(i), group_size(i)
                if kind == "collective-permute":
                    share = 1.0
                elif kind == "reduce-scatter" and not scatters:
                    share = n - 1
                else:
                    share = (n - 1) / n * (2 if kind == "all-reduce" else 1)
                total[kind] += times * size * share
        return Counter({kind: round(size) for kind, size in total.items()})

    def _runs(self, name: str, times: int = 1) -> Iterator[tuple[str, int]]:
        """Every computation below one, and how often it runs."""
        yield name, times
        for i in self.computations[name]:
            turns = self._turns(i) if i.kind == "while" else 1
            for called in i.called:
                yield from self._runs(called, times * turns)

    def _turns(self, loop: Instruction) -> int:
        """Of a scan: the number that its counter is compared with; 1 where there is none."""
        condition = self.computations[re.search(r"condition=%?([\w.-]+)", loop.text)[1]]
        limits = [re.search(r"constant\((\d+)\)", i.text) for i in condition if i.kind == "constant"]
        return max((int(limit[1]) for limit in limits if limit), default=1)

    def collectives(self) -> list[Instruction]:
        """Of one step, those that every turn of an inner loop would repeat included once."""
        return [i for name in self._reached(self.step) for i in self.computations[name] if _collective(i.kind)]

    def repeated_collectives(self) -> list[Instruction]:
        """Of a step's inner loops: each turn of the loop has them again."""
        inner = {name for i in self._whiles(self.step) for called in i.called for name in self._reached(called)}
        return [i for name in inner for i in self.computations[name] if _collective(i.kind)]

    def copies(self, shapes: Iterable[tuple[int, ...]]) -> list[Instruction]:
        """In the loop, the copies and transpositions of arrays of these shapes, in whatever order of axes.

        What goes from HBM to fast memory is a read ahead of its use and not counted; the way back is, see `write_back`.
        """
        wanted = {_order(shape) for shape in shapes}
        found = []
        for name in self.loop:
            for i in self.computations[name]:
                ahead = i.kind == "copy-start" and i.results[0].fast
                if i.kind in ("copy", "copy-start", "transpose") and not ahead and _order(i.results[0].shape) in wanted:
                    found.append(i)
        return found

    def hbm_bytes(self) -> int:
        """Read from and written to HBM in a step, from the memory spaces of its instructions' operands and results.

        Rows taken from a table, or written into a buffer in place, are small and not counted, nor are inner loops.
        """
        within = {i.name: i for i in self.computations[self.step]}
        total = 0
        for i in self.computations[self.step]:
            if i.kind in _NO_TRAFFIC or i.kind.endswith("-done"):
                continue
            if i.kind.endswith("-start"):  # from one memory to the other, or within HBM
                arrays = [array for array in i.results if array.shape]
                total += min(array.bytes for array in arrays) * sum(not array.fast for array in arrays[:2])
                continue
            moved = [array for array in i.results if not array.fast]
            for number, operand in enumerate(i.operands):
                if operand in within and not self._takes_rows(i, number):
                    moved += [array for array in within[operand].results if not array.fast]
            if self._writes_rows(i):
                moved = [array for array in moved if array.shape != i.results[0].shape]
            total += sum(array.bytes for array in moved)
        return total

    def _takes_rows(self, instruction: Instruction, number: int) -> bool:
        """Whether a fusion only looks up rows of its operand."""
        if instruction.kind != "fusion":
            return instruction.kind in ("gather", "dynamic-slice") and number == 0
        inside = self.computations[instruction.called[0]]
        name = next(i.name for i in inside if re.search(rf" parameter\({number}\)", i.text))
        return all(self._takes_rows(i, i.operands.index(name)) for i in inside if name in i.operands)

    def _writes_rows(self, instruction: Instruction) -> bool:
        inside = self.computations[instruction.called[0]] if instruction.kind == "fusion" else [instruction]
        return any(i.kind in ("dynamic-update-slice", "scatter") for i in inside)

    def _whiles(self, name: str) -> list[Instruction]:
        return [i for reached in self._reached(name) for i in self.computations[reached] if i.kind == "while"]

    def _largest_while(self, name: str) -> str:
        """The body, of the while loops in a computation, that has most instructions."""
        bodies = [re.search(r"body=%?([\w.-]+)", i.text)[1] for i in self.computations[name] if i.kind == "while"]
        return max(bodies, key=lambda body: sum(len(self.computations[reached]) for reached in self._reached(body)))

    def _reached(self, name: str) -> set[str]:
        reached, waiting = set(), [name]
        while waiting:
            if (name := waiting.pop()) not in reached:
                reached.add(name)
                waiting += [called for i in self.computations[name] for called in i.called]
        return reached


def write_back(copy: Instruction) -> bool:
    """Whether a copy goes from fast memory to HBM: the compiler had held the array there."""
    return copy.kind == "copy-start" and not copy.results[0].fast and copy.results[1].fast


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many of each kind, without the -start of those that are waited for elsewhere."""
    return Counter(i.kind.removesuffix("-start") for i in instructions)


def result_bytes(instruction: Instruction) -> int:
    """Of what arrives on a chip. A -start's result also names its operands."""
    arrays = [array for array in instruction.results if array.shape]
    if instruction.kind.endswith("-start") and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :]
    return sum(array.bytes for array in arrays)


def group_size(instruction: Instruction) -> int:
    """How many chips a collective is among; 1 for one that does not say."""
    text = instruction.text
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", named[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(tiled[1])
    return 1


def _collective(kind: str) -> bool:
    return kind.removesuffix("-start") in COLLECTIVES


def _order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _instruction(line: str, name: str, result: str, kind: str) -> Instruction:
    arrays = []
    for type_, sizes, layout in _ARRAY.findall(result):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        arrays.append(Array(shape, math.prod(shape) * _BITS.get(type_, 0) // 8, "S(1)" in layout))
    called = re.search(r"branch_computations=\{([^}]*)\}", line)
    branches = re.findall(r"[\w.-]+", called[1]) if called else []
    operation = _OPERATION.search(line)
    source = operation[1].rpartition("closed_call/")[2] if operation else ""
    operands = tuple(_OPERAND.findall(line.partition(f" {kind}(")[2].partition(")")[0]))
    return Instruction(name, kind, tuple(arrays), (*_CALLED.findall(line), *branches), operands, source, line.strip())
