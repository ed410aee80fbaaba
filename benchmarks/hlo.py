"""Counts the kernels, memory traffic and collectives of an optimised XLA program from its text.

XLA's own "bytes accessed" counts the body of a loop once, and a TPU's VMEM as memory. Here an
instruction that runs reads its operands and writes its results: those in HBM count, each operand
once. Bodies of loops count times their known trips. Instructions that only name memory (tuples,
bitcasts) count nothing. A slice of an operand counts as the slice.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable

_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_ITEM_BITS |= {"c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}

# No work, or work that is counted where it starts.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "async-done"}
_FREE |= {"async-update", "copy-done", "slice-done", "send-done", "recv-done"}
# Annotations that the compiler leaves in its text.
_FREE_CALLS = {"AllocateBuffer", "Sharding", "LayoutConstraint", "ConcatBitcast"}

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVES += ("collective-broadcast", "ragged-all-to-all")
_SLICES = ("dynamic-slice", "slice", "gather")

_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_LAYOUT = re.compile(r"\{([\d,]*)(?::[^T]*T\(([\d,]+)\))?")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_NAME = r"%([^\s,(){}]+)"
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|\w+_computations?)=(\{[^}]*\}|[^\s,]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass
class Counts:
    """Work of a program on one device."""

    traffic: float = 0.0  # bytes read from and written to HBM
    kernels: int = 0  # instructions that run
    loops: int = 0  # `while` instructions
    unknown_trips: int = 0  # of them, those counted as one trip
    collectives: int = 0
    collective_bytes: float = 0.0  # the larger of operands and results

    def add(self, other: "Counts", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name) + times * getattr(other, field.name)
            setattr(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of a shape's text, in bytes of memory."""

    dtype: str
    bytes: int
    in_hbm: bool  # not in a TPU's VMEM or among its semaphores


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    results: tuple[Buffer, ...]  # in the order of the text, those of nested tuples included
    arguments: str  # the text in parentheses
    attributes: str  # the text after it

    @property
    def operands(self) -> list[str]:
        """Names of the operands, each once."""
        return list(dict.fromkeys(re.findall(_NAME, self.arguments)))

    def operand(self, number: int) -> str:
        """Name of an operand."""
        return re.findall(_NAME, self.arguments)[number]

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of computations by the attribute that names them."""
        return {
            key: [name.strip().lstrip("%") for name in value.strip("{}").split(",")]
            for key, value in _CALLED.findall(self.attributes)
        }

    @property
    def target(self) -> str:
        """Target of a custom call."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def count(text: str) -> Counts:
    """Counts an optimised program, `compiled.as_text()`. Raises ValueError if it has no entry."""
    computations, entry = parse(text)
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return _of_computation(entry, computations)


def parse(text: str) -> tuple[dict[str, Computation], str | None]:
    """Returns the instructions of each computation by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[1]] = _instruction(*found.groups())
        elif line.startswith("}"):
            current = None
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        shape, text = text[:end], text[end:]
    else:
        shape, _, text = text.partition(" ")
    opcode, _, rest = text.partition("(")
    end = _closing(rest)
    return Instruction(name, opcode.strip(), buffers(shape), rest[:end], rest[end + 1 :])


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before the text."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def buffers(shape: str) -> tuple[Buffer, ...]:
    """Returns the arrays of a shape's text, such as "(f32[2,3]{1,0}, bf16[4]{0:T(128)S(1)})"."""
    found = []
    for dtype, sides, layout in _SHAPE.findall(shape):
        items = _items([int(side.lstrip("<=")) for side in sides.split(",") if side], layout)
        bits = _ITEM_BITS.get(dtype)
        if bits is None:
            bits = int(re.search(r"\d+", dtype)[0])
        space = _SPACE.search(layout)
        found.append(Buffer(dtype, items * bits // 8, not space or space[1] == "0"))
    return tuple(found)


def _items(sides: list[int], layout: str) -> int:
    """Returns the number of items in memory: a TPU pads the minor axes to whole tiles."""
    found = _LAYOUT.match(layout)
    if found and found[2]:
        tile = [int(side) for side in found[2].split(",")]
        minor = [int(axis) for axis in found[1].split(",") if axis]
        for axis, side in zip(minor, reversed(tile), strict=False):
            sides[axis] = -(-sides[axis] // side) * side
    return math.prod(sides)


def _of_computation(name: str, computations: dict[str, Computation]) -> Counts:
    """Counts one run of a computation."""
    total = Counts()
    for instruction in computations[name].values():
        total.add(*_of_instruction(instruction, computations[name], computations))
    return total


def _of_instruction(
    instruction: Instruction, around: Computation, computations: dict[str, Computation]
) -> tuple[Counts, int]:
    """Returns counts, and how many times they count."""
    opcode, called = instruction.opcode, instruction.called

    def of(key: str) -> Counts:
        return _of_computation(called[key][0], computations)

    if opcode in _FREE or opcode.endswith("-done") or instruction.target in _FREE_CALLS:
        return Counts(), 1
    if opcode == "while":
        trips = _trips(instruction, around, computations)
        counts = Counts(loops=1, unknown_trips=int(trips is None))
        counts.add(of("body"), 1 if trips is None else trips)
        return counts, 1
    if opcode == "conditional":
        branches = [name for key in called if "comp" in key for name in called[key]]
        each = [_of_computation(name, computations) for name in branches]
        return max(each, key=lambda counts: counts.traffic), 1
    if opcode == "call":
        return of("to_apply"), 1
    if opcode == "async-start":
        return of("calls"), 1
    counts = Counts(kernels=1)
    body = computations[called["calls"][0]] if opcode == "fusion" else None
    counts.traffic, between = _bytes(instruction, around, body)
    if opcode.removesuffix("-start") in _COLLECTIVES:
        counts.collectives, counts.collective_bytes = 1, between
    return counts, 1


def _trips(
    loop: Instruction, around: Computation, computations: dict[str, Computation]
) -> int | None:
    """Returns a loop's trips: as XLA states them, or by a counter that is compared to a constant.

    None if neither tells: the loop ends when its data say so.
    """
    if stated := _TRIPS.search(loop.attributes):
        return int(stated[1])
    condition = computations[loop.called["condition"][0]]
    compares = [i for i in condition.values() if i.opcode == "compare"]
    if len(compares) != 1 or "direction=LT" not in compares[0].attributes:
        return None
    counter, limit = (condition[name] for name in compares[0].operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    start = around[loop.operands[0]]
    if start.opcode == "tuple":
        start = around[start.operand(int(place[1]))]
    while start.opcode in ("copy", "bitcast"):
        start = around[start.operands[0]]
    return int(limit.arguments) - int(start.arguments) if start.opcode == "constant" else None


def _bytes(
    instruction: Instruction, around: Computation, body: Computation | None
) -> tuple[float, float]:
    """Returns bytes to and from HBM, and the larger of operands and results.

    Args:
      around: the computation of the instruction.
      body: the computation of a fusion.
    """
    opcode, names = instruction.opcode, instruction.operands
    operands = {name: around[name].results for name in names}
    results = list(instruction.results)
    if opcode.endswith("-start") and len(results) > len(names):
        for buffer in itertools.chain(*operands.values()):  # named once more among the results
            if buffer in results:
                results.remove(buffer)
    if opcode == "custom-call" and len(results) > 1:
        results = [results[0], *(buffer for buffer in results[1:] if buffer.dtype != "s8")]
    read = {name: _hbm(buffers) for name, buffers in operands.items()}
    written = _hbm(results)
    between = max(sum(read.values()), written)
    whole = max((buffer.bytes for buffer in results), default=0)
    if opcode in (*_SLICES, "slice-start"):
        read[names[0]] = min(read[names[0]], whole)
    elif opcode == "dynamic-update-slice":
        read[names[0]], written = 0, min(written, read[names[1]])
    elif body is not None:
        for number, parameter in _parameters(body).items():
            name = instruction.operand(number)
            touched = _touched(parameter, body)
            if touched is not None:
                read[name] = min(read[name], touched)
        written = max(written - _kept_in_place(body), 0)
    return sum(read.values()) + written, between


def _hbm(results: Iterable[Buffer]) -> int:
    return sum(buffer.bytes for buffer in results if buffer.in_hbm)


def _parameters(body: Computation) -> dict[int, str]:
    """Returns the names of a computation's parameters by number."""
    return {int(i.arguments): i.name for i in body.values() if i.opcode == "parameter"}


def _touched(name: str, body: Computation) -> int | None:
    """Returns the bytes of a fusion's parameter that it reads in slices; None if it reads all."""
    total = 0
    for user in body.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode in _SLICES and first:
            total += sum(buffer.bytes for buffer in user.results)
        elif user.opcode == "bitcast":
            inner = _touched(user.name, body)
            if inner is None:
                return None
            total += inner
        elif not (user.opcode == "dynamic-update-slice" and first):
            return None
    return total


def _kept_in_place(body: Computation) -> int:
    """Returns the bytes of a fusion's results that stay as they are beside updated slices."""
    kept = 0
    for update in body.values():
        if update.opcode == "dynamic-update-slice":
            whole, part = (body[name].results[0].bytes for name in update.operands[:2])
            kept += whole - part
    return kept
