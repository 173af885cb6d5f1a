"""How many bytes a program that is compiled for a TPU moves between its memory (HBM) and the chip.

Read from the compiled program's text: each instruction reads its operands and writes its results once, unless they are
placed in vector memory, which the text marks `S(1)`. Slices and gathers read what they take, and an update in place
writes the update. XLA's own count (`cost_analysis`) also has what stays in vector memory.
"""

import re
from typing import NamedTuple

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "iota")
TAKING = ("slice", "dynamic-slice", "gather")


class Instruction(NamedTuple):
    """A line of a computation: `%name = type operation(%operand, ...), calls=%computation`."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    calls: str
    root: bool


def hbm_traffic(program: str) -> int:
    """Bytes that the entry computation of a compiled program moves."""
    computations, entry = read(program)
    types = {line.name: line.type for line in computations[entry]}
    return sum(traffic(line, types, computations) for line in computations[entry] if line.operation not in FREE)


def traffic(line: Instruction, types: dict[str, str], computations: dict[str, list[Instruction]]) -> int:
    if line.operation in ("copy-start", "slice-start"):  # destination, source (the other way round to slice), a flag
        ends = arrays(line.type)[:2]
        return min(size for size, _ in ends) * sum("S(" not in layout for _, layout in ends)
    if line.operation in TAKING:
        return 2 * hbm_bytes(line.type)
    body = computations.get(line.calls, [])
    read_bytes = 0
    for index, operand in enumerate(line.operands):
        if stored := hbm_bytes(types.get(operand, "")):
            read_bytes += taken(body, index, stored)
    return read_bytes + written(body, hbm_bytes(line.type))


def taken(body: list[Instruction], index: int, stored: int) -> int:
    """What a fused computation reads of its operand number `index`, which has `stored` bytes."""
    names = [line.name for line in body if line.operation == "parameter" and line.operands == (str(index),)]
    users = [line for line in body if set(names) & set(line.operands)]
    if users and all(line.operation in TAKING and line.operands[0] in names for line in users):
        return min(stored, sum(sum(sizes(line.type)) for line in users))
    if users and all(line.operation == "dynamic-update-slice" and line.operands[0] in names for line in users):
        return 0
    return stored


def written(body: list[Instruction], result: int) -> int:
    """What a fused computation writes of results of `result` bytes."""
    by_name = {line.name: line for line in body}
    roots = [line for line in body if line.root and line.operation == "dynamic-update-slice"]
    return min(result, sum(sum(sizes(by_name[line.operands[1]].type)) for line in roots)) if roots else result


def read(program: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and which is its entry."""
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for text in program.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", text):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif line := re.match(r"\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(,|$)", text):
            calls = re.search(r"calls=%([\w.\-]+)", text)
            operands = (line[5],) if line[4] == "parameter" else tuple(re.findall(r"%([\w.\-]+)", line[5]))
            found = Instruction(line[2], line[3], line[4], operands, calls[1] if calls else "", bool(line[1]))
            computations[name].append(found)
    return computations, entry


def sizes(type_: str) -> list[int]:
    """Bytes of every array of a type, wherever it is."""
    return [size for size, _ in arrays(type_)]


def hbm_bytes(type_: str) -> int:
    """Bytes of the arrays of a type that are in HBM."""
    return sum(size for size, layout in arrays(type_) if "S(" not in layout)


def arrays(type_: str) -> list[tuple[int, str]]:
    found = []
    for item, dimensions, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_):
        size = ITEM_BYTES.get(item, 4)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        found.append((size, layout))
    return found
