"""What a compiled program says of itself: its collectives and its memory traffic, read from the text of its HLO.

Loops count as often as they run, by the constant in their condition: the compiler's own sums count their bodies once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "all-gather-done", "all-reduce-done",
    "optimization-barrier", "collective-permute-done", "async-done", "async-update", "reshape", "broadcast",
}  # fmt: skip
"""Instructions that move nothing, or whose beginning has been counted."""


@dataclass(frozen=True)
class Array:
    """An array of a program: its bytes, and whether it is in the main memory, not in the fast one beside the units."""

    bytes: float
    main: bool


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    code: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computation = list[Instruction]


@dataclass(frozen=True)
class Collective:
    """A kind of collective: how many run, the bytes of the whole arrays, and what each chip receives of them."""

    count: float = 0.0
    bytes: float = 0.0
    received: float = 0.0

    def __add__(self, other: "Collective") -> "Collective":
        return Collective(self.count + other.count, self.bytes + other.bytes, self.received + other.received)


@dataclass(frozen=True)
class Program:
    """A compiled program: computations by name, and how often each runs."""

    computations: Mapping[str, Computation]
    runs: Mapping[str, float]
    entry: str
    fused: frozenset[str] = field(default_factory=frozenset)


def parse(text: str) -> Program:
    """Read the text of a compiled program. Raises ValueError for text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            match = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
            lines = None
            if match is not None:
                lines = computations.setdefault(match.group(2), [])
                entry = match.group(2) if match.group(1) else entry
        elif lines is not None and (found := _INSTRUCTION.match(line)) is not None:
            lines.append(_instruction(found))
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return Program(computations, _runs(computations, entry), entry, _fused(computations))


def collectives(program: Program) -> dict[str, Collective]:
    """The collectives of one run of the program, by kind; pieces of one that the compiler split count once.

    TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and the slice of it that a chip keeps: it counts
    as the reduce-scatter that it is. An all-reduce whose slice is taken outside its fusion
    sends everything, and counts so.
    """
    once: dict[str, tuple[str, Collective]] = {}
    for where, body in program.computations.items():
        for line in body:
            kind = line.code.removesuffix("-start")
            if kind not in COLLECTIVES or not program.runs.get(where):
                continue
            channel = re.search(r"channel_id=(\d+)", line.attributes)
            key = channel.group(1) if channel else f"{where} {line.name}"
            known = once.get(key)
            if known is None or known[1].count < program.runs[where]:
                one = _collective(kind, line, body, program.runs[where])
                if kind == "all-reduce" and where in program.fused and _scattered(line, body):
                    # Each chip receives its share of the sum alone, half of what an all-reduce brings it.
                    kind, one = "reduce-scatter", Collective(one.count, one.bytes, one.received / 2)
                once[key] = kind, one
    total: dict[str, Collective] = {}
    for kind, one in once.values():
        total[kind] = total.get(kind, Collective()) + one
    return total


def traffic(program: Program) -> float:
    """Bytes that one run moves between a chip's main memory and its units: operands and results of what is not fused.

    A slice of an array counts as much as it takes, and an update in place as much as it puts.
    """
    total = 0.0
    for where, body in program.computations.items():
        if where in program.fused or not program.runs.get(where):
            continue
        arrays = {line.name: line for line in body}
        total += program.runs[where] * sum(_moved(line, arrays, program) for line in body)
    return total


def _instruction(found: re.Match) -> Instruction:
    rest = found.group(3)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    code = rest[:start]
    operands = (inside,) if code in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(
        found.group(2), code, tuple(_arrays(shape)), operands, rest[stop + 1 :], found.group(1) is not None
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sides, layout in _ARRAY.findall(shape):
        size = SIZES.get(dtype, 1) * math.prod(int(n) for n in sides.split(",") if n)
        yield Array(size, re.search(r"S\([1-9]", layout or "") is None)


def _called(line: Instruction) -> dict[str, list[str]]:
    """The computations that an instruction runs, by the attribute that names them."""
    found: dict[str, list[str]] = {}
    for name, one, many in re.findall(
        r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation|called_computations)"
        r"=(?:%([\w.-]+)|\{([^}]*)\})",
        line.attributes,
    ):
        found[name] = [one] if one else _NAME.findall(many)
    return found


def _runs(computations: Mapping[str, Computation], entry: str) -> dict[str, float]:
    runs = dict.fromkeys(computations, 0.0)
    callers: dict[str, int] = dict.fromkeys(computations, 0)
    edges: dict[str, list[tuple[str, float]]] = {}
    for name, body in computations.items():
        edges[name] = []
        for line in body:
            called = _called(line)
            times = _passes(called["condition"][0], computations) if "condition" in called else 1.0
            for part, targets in called.items():
                for target in targets:
                    if target in computations:
                        edges[name].append((target, times if part in ("body", "condition") else 1.0))
                        callers[target] += 1
    runs[entry] = 1.0
    ready = [name for name, count in callers.items() if count == 0]
    while ready:  # callers before what they call
        name = ready.pop()
        for target, times in edges[name]:
            runs[target] += runs[name] * times
            callers[target] -= 1
            if callers[target] == 0:
                ready.append(target)
    return runs


def _passes(condition: str, computations: Mapping[str, Computation]) -> float:
    """How often a loop runs: the constant that its condition compares its counter with."""
    body = computations.get(condition, [])
    inner = [line for one in body for names in _called(one).values() for n in names for line in computations.get(n, [])]
    numbers = [line.operands[0] for line in (*body, *inner) if line.code == "constant"]
    return float(max((int(n) for n in numbers if re.fullmatch(r"\d+", n)), default=1))


def _fused(computations: Mapping[str, Computation]) -> frozenset[str]:
    """Computations whose values never leave the units: those of fusions, and of reductions."""
    inside: set[str] = set()
    for body in computations.values():
        for line in body:
            called = _called(line)
            if line.code == "fusion" or "to_apply" in called:
                inside.update(n for part in ("calls", "to_apply") for n in called.get(part, []))
    return frozenset(inside)


def _collective(kind: str, line: Instruction, body: Computation, runs: float) -> Collective:
    by_name = {other.name: other for other in body}
    given = sum(a.bytes for n in line.operands if n in by_name for a in by_name[n].results)
    results = line.results
    if line.code.endswith("-start") and kind != "all-reduce":
        results = results[len(results) // 2 :] if kind == "all-gather" else results[1:2]
    answered = sum(a.bytes for a in results)
    n = _group(line.attributes)
    if kind == "all-gather":
        whole, received = answered, answered * (n - 1) / n
    elif kind == "reduce-scatter":
        whole, received = (answered * n), answered * (n - 1)
    elif kind == "all-reduce":
        whole, received = answered, 2 * answered * (n - 1) / n
    elif kind == "all-to-all":
        whole, received = answered, answered * (n - 1) / n
    else:
        whole, received = answered or given, answered or given
    return Collective(runs, runs * whole, runs * received)


def _scattered(line: Instruction, body: Computation) -> bool:
    """Whether a fusion takes no more of its all-reduce than the one part that belongs to a chip of the group."""
    names, taken = {line.name}, 0.0
    for other in body:  # operands come before what takes them
        if names.isdisjoint(other.operands):
            continue
        if other.code in ("bitcast", "reshape") and not other.root:
            names.add(other.name)
        elif other.code == "dynamic-slice" and other.operands[0] in names:
            taken += sum(a.bytes for a in other.results)
        else:
            return False
    return 0 < taken * _group(line.attributes) <= sum(a.bytes for a in line.results)


def _group(attributes: str) -> int:
    """How many chips take part in one instance of a collective."""
    if (match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)) is not None:
        return int(match.group(2))
    if (match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)) is not None:
        return len(match.group(1).split(","))
    if (match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    return 2


def _moved(line: Instruction, arrays: Mapping[str, Instruction], program: Program) -> float:
    if line.code in _FREE or line.code.endswith("-done"):
        return 0.0
    out = [a for a in line.results if a.main]
    into = [[a for a in arrays[n].results if a.main] for n in line.operands if n in arrays]
    if line.code.endswith("-start"):
        # Results of the beginning hold the operands as well, and flags.
        taken = sum(a.bytes for part in into for a in part)
        if line.code == "slice-start":
            return line.results[1].bytes if len(line.results) > 1 else taken
        return taken + sum(a.bytes for a in line.results[1:2] if a.main)
    if line.code in ("dynamic-slice", "slice", "gather"):
        return 2 * sum(a.bytes for a in out)
    if line.code == "dynamic-update-slice":
        return 2 * sum(a.bytes for part in into[1:2] for a in part)
    if line.code != "fusion":
        return sum(a.bytes for part in into for a in part) + sum(a.bytes for a in out)
    inner = program.computations.get(_called(line).get("calls", [""])[0], [])
    read = sum(min(sum(a.bytes for a in part), _used(i, inner)) for i, part in enumerate(into))
    return read + min(sum(a.bytes for a in out), _put(inner))


def _used(number: int, inner: Computation) -> float:
    """What a fusion reads of its operand at most: the slices that it takes, if it takes nothing else."""
    own = next((line.name for line in inner if line.code == "parameter" and line.operands == (str(number),)), None)
    users = [line for line in inner if own in line.operands]
    if not users or any(
        line.code not in ("dynamic-slice", "slice", "gather", "dynamic-update-slice") for line in users
    ):
        return math.inf
    if any(line.code == "dynamic-update-slice" and line.operands[0] != own for line in users):
        return math.inf
    return sum(0.0 if line.code == "dynamic-update-slice" else line.results[0].bytes for line in users)


def _put(inner: Computation) -> float:
    """What a fusion writes at most: its update, where it updates an array in place."""
    by_name = {line.name: line for line in inner}
    root = next((line for line in inner if line.root), None)
    while root is not None and root.code in ("bitcast", "copy") and root.operands and root.operands[0] in by_name:
        root = by_name[root.operands[0]]
    if root is None or root.code != "dynamic-update-slice" or root.operands[1] not in by_name:
        return math.inf
    return sum(a.bytes for a in by_name[root.operands[1]].results)
