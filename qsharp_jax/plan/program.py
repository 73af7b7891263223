"""A compiled program, parsed from its text (`compiled.as_text()`), and the bytes that its collectives bring.

A program is a list of computations, each a list of instructions; a decode loop is a while over blocks whose body has a
while over steps.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "fsu" for bits in (4, 8, 16, 32, 64)}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERATION = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `fast`: in the chip's fast memory instead of HBM."""

    shape: tuple[int, ...]
    bytes: int
    fast: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation, with the computations it runs (`called`), the instructions it reads (`operands`), and
    the Python operation it comes from (`source`), as far as the compiler says.
    """

    name: str
    kind: str
    results: tuple[Array, ...]
    called: tuple[str, ...]
    operands: tuple[str, ...]
    source: str
    text: str


class Program:
    """The instructions of a program by computation, and the name of its entry computation.

    `blocks` and `step` are the names of a decode loop's computations.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current, self.entry = [], None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _INSTRUCTION.match(line):
                current.append(_instruction(line, *instruction.groups()))

    @functools.cached_property
    def blocks(self) -> str:
        return self._largest_while(self.entry)

    @functools.cached_property
    def step(self) -> str:
        return self._largest_while(self.blocks)

    def traffic(self, start: str | None = None) -> Counter[str]:
        """Count the bytes that collectives bring to a chip, by kind, in one run of a computation or of the program.

        Those in a loop count once per iteration. In rings of n chips, an all-gather brings (n - 1) / n of its result,
        an all-reduce twice that, a reduce-scatter (n - 1) / n of what it reduces.
        """
        total, seen = Counter(), set()
        for name, times in self._runs(self.entry if start is None else start):
            # The compiler's name for a reduce-scatter written as an all-reduce and a slice.
            scatters = "all-reduce-scatter" in name
            for i in self.computations[name]:
                kind = i.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                # An all-gather that overlaps several products is listed in each of them, with one channel.
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
        """Yield every computation reached from one, and how often it runs."""
        yield name, times
        for i in self.computations[name]:
            turns = self._turns(i) if i.kind == "while" else 1
            for called in i.called:
                yield from self._runs(called, times * turns)

    def _turns(self, loop: Instruction) -> int:
        """Return the limit of a scan's counter; 1 without one."""
        condition = self.computations[re.search(r"condition=%?([\w.-]+)", loop.text)[1]]
        limits = [re.search(r"constant\((\d+)\)", i.text) for i in condition if i.kind == "constant"]
        return max((int(limit[1]) for limit in limits if limit), default=1)

    def _largest_while(self, name: str) -> str:
        """Return the body with the most instructions among the while loops in a computation."""
        bodies = [re.search(r"body=%?([\w.-]+)", i.text)[1] for i in self.computations[name] if i.kind == "while"]
        return max(bodies, key=lambda body: sum(len(self.computations[reached]) for reached in self.reached(body)))

    def reached(self, name: str) -> set[str]:
        """Return the names of a computation and of all that it runs."""
        reached, waiting = set(), [name]
        while waiting:
            if (name := waiting.pop()) not in reached:
                reached.add(name)
                waiting += [called for i in self.computations[name] for called in i.called]
        return reached


def result_bytes(instruction: Instruction) -> int:
    """Return the bytes of an instruction's result; that of a -start also lists its operands."""
    arrays = [array for array in instruction.results if array.shape]
    if instruction.kind.endswith("-start") and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :]
    return sum(array.bytes for array in arrays)


def group_size(instruction: Instruction) -> int:
    """Return the number of chips in a collective; 1 if it does not say."""
    text = instruction.text
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", named[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(tiled[1])
    return 1


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
