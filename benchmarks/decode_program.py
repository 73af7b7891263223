"""The step of a compiled decode loop: its collectives, its copies, and the bytes that it moves.

`benchmarks/tpu.py` reads the programs of the TPU compiler with it.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable

from qsharp_jax.plan.program import COLLECTIVES, Instruction, Program, result_bytes

REDUCTIONS = ("all-reduce", "reduce-scatter")
# Instructions that move no array by themselves.
_NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "iota")


class DecodeProgram(Program):
    """A program with a decode loop; `loop` has the names of the computations within it."""

    @functools.cached_property
    def loop(self) -> set[str]:
        return self.reached(self.blocks)

    def collectives(self) -> list[Instruction]:
        """Return those of one step, those that every turn of an inner loop would repeat included once."""
        return [i for name in self.reached(self.step) for i in self.computations[name] if _is_collective(i)]

    def repeated_collectives(self) -> list[Instruction]:
        """Return those of a step's inner loops: each turn of the loop repeats them."""
        whiles = [i for name in self.reached(self.step) for i in self.computations[name] if i.kind == "while"]
        inner = {name for i in whiles for called in i.called for name in self.reached(called)}
        return [i for name in inner for i in self.computations[name] if _is_collective(i)]

    def copies(self, shapes: Iterable[tuple[int, ...]]) -> list[Instruction]:
        """Return the loop's copies and transpositions of arrays of these shapes, with the axes in any order.

        A copy from HBM to fast memory is a read ahead of its use and not counted; the way back is, see `is_write_back`.
        """
        wanted = {_order(shape) for shape in shapes}
        return [
            i
            for name in self.loop
            for i in self.computations[name]
            if i.kind in ("copy", "copy-start", "transpose")
            and not (i.kind == "copy-start" and i.results[0].fast)
            and _order(i.results[0].shape) in wanted
        ]

    def hbm_bytes(self) -> int:
        """Count the bytes read from and written to HBM in a step, from where its instructions' arrays are.

        Of what is written into a buffer in place, and of what is gathered or sliced, only that part is counted; inner
        loops are not counted.
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
                if operand not in within:
                    continue
                arrays = [array for array in within[operand].results if not array.fast]
                part = self._part_read(i, number)
                if part is None:
                    moved += arrays
                elif arrays:
                    total += part
            if self._writes_rows(i):
                moved = [array for array in moved if array.shape != i.results[0].shape]
            total += sum(array.bytes for array in moved)
        return total

    def _part_read(self, instruction: Instruction, number: int) -> int | None:
        """Return the bytes that are gathered or sliced from an operand, None if all of it is read."""
        if instruction.kind in ("gather", "dynamic-slice"):
            return result_bytes(instruction) if number == 0 else None
        if instruction.kind != "fusion":
            return None
        inside = self.computations[instruction.called[0]]
        names = {next(i.name for i in inside if re.search(rf" parameter\({number}\)", i.text))}
        total = 0
        for i in inside:  # in order: operands come first
            used = [place for place, name in enumerate(i.operands) if name in names]
            if used and i.kind == "bitcast" and not i.text.startswith("ROOT"):
                names.add(i.name)
                continue
            for place in used:
                part = self._part_read(i, place)
                if part is None:
                    return None
                total += part
        return total

    def _writes_rows(self, instruction: Instruction) -> bool:
        inside = self.computations[instruction.called[0]] if instruction.kind == "fusion" else [instruction]
        return any(i.kind in ("dynamic-update-slice", "scatter") for i in inside)


def is_write_back(copy: Instruction) -> bool:
    """Return whether a copy goes from fast memory to HBM: the compiler had held the array there."""
    return copy.kind == "copy-start" and not copy.results[0].fast and copy.results[1].fast


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """Count the instructions of each kind, without the -start of those that are waited for elsewhere."""
    return Counter(i.kind.removesuffix("-start") for i in instructions)


def _is_collective(instruction: Instruction) -> bool:
    return instruction.kind.removesuffix("-start") in COLLECTIVES


def _order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))
