"""Reads the text of a compiled program: instructions, the computations they call, their sizes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BITS = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    **{"c128": 128, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0},
}
"""Bits of an element; any `f8...` type has 8."""
MAIN_MEMORY = 0
"""The memory space of a chip's HBM. Others are on the chip: a TPU's layouts name them `S(1)`."""
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
# Of one that runs beside the others, on a core for sparse things, the thread is told.
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An array of a program."""

    dtype: str
    dims: tuple[int, ...]
    space: int = MAIN_MEMORY

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> float:
        """Bytes of an element."""
        return ITEM_BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32) / 8

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return self.count * self.item_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction: `%name = types opcode(operands), attributes`."""

    name: str
    types: tuple[ArrayType, ...]
    """Of its result; several for a tuple."""
    opcode: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation; the literal of a constant."""
    attributes: str
    root: bool = False

    @property
    def bytes(self) -> float:
        """Of its result, in whatever memory."""
        return sum((array.bytes for array in self.types), 0.0)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by the role in which it calls them."""
        return dict(_CALLED.findall(self.attributes))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        roles = "true_computation", "false_computation"
        return tuple(self.called[role] for role in roles if role in self.called)

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Those of `attribute={1,2}`; empty if there is none."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return _integers(match[1]) if match else ()

    @property
    def known_trips(self) -> int | None:
        """How often the compiler says that a loop runs."""
        match = _TRIPS.search(self.attributes)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {op.name: op for op in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses an instruction, and as which of its operands."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for op in self.instructions:
            for place, operand in enumerate(op.operands):
                users.setdefault(operand, []).append((op, place))
        return users

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next((op for op in self.instructions if op.root), self.instructions[-1])

    def parameters(self) -> Iterator[tuple[int, Instruction]]:
        """Parameters with their numbers."""
        for op in self.instructions:
            if op.opcode == "parameter":
                yield int(op.operands[0]), op

    def types_of(self, name: str) -> tuple[ArrayType, ...]:
        """Types of an operand; none for a literal."""
        return self.by_name[name].types if name in self.by_name else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    """Devices that run it together."""

    def trips(self, caller: Computation, loop: Instruction) -> int | None:
        """How often a `while` runs; None if that depends on data.

        The compilers of TPUs do not say it, so that it is read from the loop itself: a counter that
        starts at a constant, grows by a constant and is compared with one.
        """
        if loop.known_trips is not None:
            return loop.known_trips
        bound = self._bound(self.computations[loop.called["condition"]])
        if bound is None:
            return None
        index, limit, inclusive = bound
        first = self._initial(caller, loop, index)
        step = self._growth(self.computations[loop.called["body"]], index)
        if first is None or not step or step < 0:
            return None
        return max(0, -(-(limit + inclusive - first) // step))

    def _bound(self, condition: Computation) -> tuple[int, int, int] | None:
        """Which part of the loop's state is compared, with which limit, 1 if that is included."""
        _, compare, names = self._flattened(condition, condition.root)
        if compare.opcode != "compare" or "direction=L" not in compare.attributes:
            return None
        counter, limit = (condition.by_name.get(name) for name in names)
        value = None if limit is None else _constant(condition, limit)
        if counter is None or counter.opcode != "get-tuple-element" or value is None:
            return None
        return _index(counter), value, int("direction=LE" in compare.attributes)

    def _flattened(
        self, outer: Computation, op: Instruction
    ) -> tuple[Computation, Instruction, list[str]]:
        """An instruction, or the one within it that makes the result of a fusion: where it stands,
        itself, and what its operands are called outside."""
        if op.opcode != "fusion":
            return outer, op, list(op.operands)
        inner = self.computations[op.called["calls"]]
        outside = {each.name: op.operands[number] for number, each in inner.parameters()}
        return inner, inner.root, [outside.get(name, "") for name in inner.root.operands]

    def _initial(self, caller: Computation, loop: Instruction, index: int) -> int | None:
        state = caller.by_name[loop.operands[0]]
        if state.opcode != "tuple":
            return None
        return _constant(caller, caller.by_name[state.operands[index]])

    def _growth(self, body: Computation, index: int) -> int | None:
        """By how much the counter grows in one iteration."""
        if body.root.opcode != "tuple":
            return None
        becomes = _uncopied(body, body.by_name[body.root.operands[index]])
        where, grown, outside = self._flattened(body, becomes)
        if grown.opcode != "add":
            return None
        summands = zip(grown.operands, outside, strict=True)
        values = [
            _constant_named(place, name)
            for inside, addend in summands
            for place, name in ((where, inside), (body, addend))
        ]
        return next((value for value in values if value is not None), None)


def read(text: str) -> Module:
    """The program of `compiled.as_text()`.

    Raises:
      ValueError: the text is none of a compiled program.
    """
    computations: dict[str, Computation] = {}
    name, entry, lines = "", "", []
    for line in text.splitlines():
        head = None if name else _HEAD.match(line)
        if head:
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif name and _END.match(line):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = ""
        elif name and _LINE.match(line):
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # metadata of kernels spreads over several lines
    if not entry:
        raise ValueError("no ENTRY computation: give the text of a compiled program")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction:
    line_match = _LINE.match(line)
    assert line_match is not None
    root, name, rest = bool(line_match[1]), line_match[2], line_match[3]
    rest = _COMMENT.sub("", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(part.split()[-1].lstrip("%") for part in _parts(rest[opening + 1 : closing]))
    arrays = tuple(_array(*match) for match in _ARRAY.findall(types))
    return Instruction(name, arrays, rest[:opening], operands, rest[closing + 1 :], root)


def _array(dtype: str, dims: str, layout: str) -> ArrayType:
    space = _SPACE.search(layout)
    return ArrayType(dtype, _integers(dims.replace("<=", "")), int(space[1]) if space else 0)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens here is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if not depth:
            return place
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _parts(text: str) -> list[str]:
    """What commas outside of brackets separate."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _index(element: Instruction) -> int:
    match = re.search(r"index=(\d+)", element.attributes)
    return int(match[1]) if match else 0


def _constant_named(computation: Computation, name: str) -> int | None:
    op = computation.by_name.get(name)
    return None if op is None else _constant(computation, op)


def _uncopied(computation: Computation, op: Instruction) -> Instruction:
    """What an instruction is a copy of; itself if it is none."""
    while op.opcode in ("copy", "bitcast", "convert") and op.operands[0] in computation.by_name:
        op = computation.by_name[op.operands[0]]
    return op


def _constant(computation: Computation, op: Instruction) -> int | None:
    """The value of a constant, or of a copy of one."""
    op = _uncopied(computation, op)
    if op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.operands[0]):
        return None
    return int(op.operands[0])
