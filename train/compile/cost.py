"""What a compiled program does on each device: products, bytes, collectives; loops multiplied out.

The compiler's own `cost_analysis` counts the body of a loop once, and of an array that is sliced or
updated in place all bytes. Here a body counts as often as it runs, and a slice counts by its size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

from train.compile.hlo import MAIN_MEMORY, ArrayType, Computation, Instruction, Module
from train.compile.products import flops, is_silent_kernel

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "copy-done", "infeed"),
    *("add-dependency", "get-dimension-size", "outfeed"),
}
"""What moves nothing."""
_VIEWS = ("bitcast", "convert", "reshape")
"""A slice of them is a slice of what they are made of."""
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes a part of its first operand, and the operand that holds the part."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, of one device."""

    count: float = 0.0
    bytes: float = 0.0
    """Of their results."""
    sent: float = 0.0
    """Bytes that go over its links, by ring algorithms."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def times(self, count: float) -> Traffic:
        """So many of them."""
        return Traffic(self.count * count, self.bytes * count, self.sent * count)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in a program or a part of one."""

    flops: float = 0.0
    """Floating-point operations of products: two for each multiplication that is added."""
    bytes: float = 0.0
    """Read from main memory or written to it."""
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    """By kind."""
    open_loops: int = 0
    """Loops whose length depends on data."""
    kernels: int = 0
    """Calls of kernels that do not say what they cost; their products are missing."""

    def __add__(self, other: Cost) -> Cost:
        kinds = {*self.collectives, *other.collectives}
        none = Traffic()
        merged = {
            kind: self.collectives.get(kind, none) + other.collectives.get(kind, none)
            for kind in sorted(kinds)
        }
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            merged,
            self.open_loops + other.open_loops,
            self.kernels + other.kernels,
        )

    def times(self, count: float) -> Cost:
        """So many of it. Loops and kernels are counted as they stand in the text."""
        traffic = {kind: each.times(count) for kind, each in self.collectives.items()}
        return dataclasses.replace(
            self, flops=self.flops * count, bytes=self.bytes * count, collectives=traffic
        )

    @property
    def sent(self) -> float:
        """Bytes of all collectives that go over its links."""
        return sum((traffic.sent for traffic in self.collectives.values()), 0.0)


class CostReader:
    """Costs of a program's computations, each counted once."""

    def __init__(self, module: Module, open_trips: int = 1) -> None:
        """`open_trips`: how often loops of the whole program run whose length is data."""
        self._module, self._open_trips = module, open_trips
        self._costs: dict[tuple[str, bool], Cost] = {}

    def program(self) -> Cost:
        """All of it."""
        return self._computation(self._module.entry)

    def _computation(self, name: str, fused: bool = False) -> Cost:
        """`fused`: within a fusion, whose inner results never reach main memory."""
        if (name, fused) not in self._costs:
            where = self._module.computations[name]
            costs = (self._instruction(where, each, fused) for each in where.instructions)
            self._costs[name, fused] = functools.reduce(lambda a, b: a + b, costs, Cost())
        return self._costs[name, fused]

    def _instruction(self, where: Computation, op: Instruction, fused: bool) -> Cost:
        opcode = op.opcode
        if opcode == "while":
            return self._loop(where, op)
        if opcode == "conditional":
            return _largest(self._computation(name) for name in op.branches)
        if opcode == "fusion":
            inside = self._computation(op.called["calls"], fused=True)
            return inside + Cost(bytes=0.0 if fused else self._fusion_bytes(where, op))
        if opcode in ("call", "call-start"):
            return self._computation(op.called["to_apply"], fused)
        if opcode == "async-start":
            return self._computation(op.called["calls"], fused)
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return self._collective(where, op, kind, fused)
        if opcode in _FREE or (opcode.endswith(("-done", "-update")) and opcode not in _UPDATES):
            return Cost()
        moved = 0.0 if fused else _plain_bytes(where, op)
        return Cost(flops(where, op), moved, kernels=is_silent_kernel(op))

    def _loop(self, where: Computation, loop: Instruction) -> Cost:
        trips = self._module.trips(where, loop)
        body = self._computation(loop.called["body"])
        once = body + self._computation(loop.called["condition"])
        if trips is None:
            whole = where.name == self._module.entry
            return once.times(float(self._open_trips if whole else 1)) + Cost(open_loops=1)
        return once.times(float(trips))

    def _collective(self, where: Computation, op: Instruction, kind: str, fused: bool) -> Cost:
        """A fusion of an all-reduce and of the slice that a device keeps is a reduce-scatter."""
        operands = sum((_bytes(where.types_of(name)) for name in op.operands), 0.0)
        results = op.bytes
        if op.opcode.endswith("-start"):
            # Its result holds the operands beside what is received.
            results = results - operands if kind != "all-reduce" else results
        size = group_size(op.attributes, self._module.partitions)
        if kind == "all-reduce" and where.name.startswith("all-reduce-scatter"):
            kind, results = "reduce-scatter", operands / size
        sent = ring_bytes(kind, operands, results, size)
        moved = 0.0 if fused else operands + results
        return Cost(bytes=moved, collectives={kind: Traffic(1.0, results, sent)})

    def _fusion_bytes(self, where: Computation, op: Instruction) -> float:
        inner = self._module.computations[op.called["calls"]]
        read = 0.0
        for number, parameter in inner.parameters():
            outside = where.types_of(op.operands[number])
            if _in_main_memory(outside):
                read += self._read(inner, parameter)
        return read + self._written(inner, inner.root, op.types)

    def _read(self, inner: Computation, source: Instruction) -> float:
        """Bytes that a fusion needs of what it is given: all of them, or its slices."""
        whole, total = source.bytes, 0.0
        for user, place in inner.users.get(source.name, ()):
            total += self._read_by(inner, source, user, place)
            if total >= whole:
                return whole
        return total

    def _read_by(
        self, inner: Computation, source: Instruction, user: Instruction, place: int
    ) -> float:
        if user.opcode in _SLICES and place == 0:
            return user.types[0].count * source.types[0].item_bytes
        if user.opcode in _UPDATES and place == 0:
            # Written in place; a scatter that adds reads what it changes.
            part = inner.types_of(user.operands[_UPDATES[user.opcode]])
            return _bytes(part) if user.opcode == "scatter" else 0.0
        if user.opcode in _VIEWS:
            share = self._read(inner, user) / max(user.bytes, 1.0)
            return share * source.bytes
        if user.opcode == "fusion":
            nested = self._module.computations[user.called["calls"]]
            parameter = dict(nested.parameters())[place]
            return self._read(nested, parameter)
        if user.opcode == "tuple":
            return 0.0
        return source.bytes

    def _written(
        self, inner: Computation, root: Instruction, types: tuple[ArrayType, ...]
    ) -> float:
        """Bytes of a fusion's results, of one that is updated in place only the part."""
        if root.opcode == "tuple":
            pairs = zip(root.operands, types, strict=True)
            parts = (self._written(inner, inner.by_name[name], (array,)) for name, array in pairs)
            return sum(parts, 0.0)
        if not _in_main_memory(types):
            return 0.0
        while root.opcode in _VIEWS and root.operands[0] in inner.by_name:
            root = inner.by_name[root.operands[0]]
        if root.opcode == "parameter":
            return 0.0
        if root.opcode in _UPDATES:
            return _bytes(inner.types_of(root.operands[_UPDATES[root.opcode]]))
        if root.opcode == "fusion":
            nested = self._module.computations[root.called["calls"]]
            return self._written(nested, nested.root, types)
        return _bytes(types)


def program_cost(module: Module, tokens: int = 1) -> Cost:
    """What each device does in one run of a program, or for each of the tokens that its loop draws:
    what surrounds the loop is shared by them."""
    return CostReader(module, tokens).program().times(1 / tokens)


def collectives(module: Module) -> Iterator[tuple[Instruction, int]]:
    """Every collective that a program may run, and how often: all branches of conditionals."""
    yield from _collectives(module, module.entry, 1)


def _collectives(module: Module, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    where = module.computations[name]
    for op in where.instructions:
        if op.opcode.removesuffix("-start") in COLLECTIVES:
            yield op, times
            continue  # what it calls adds two numbers
        trips = module.trips(where, op) if op.opcode == "while" else 1
        # Kernels name functions of their own, which stand in no text.
        for called in module.computations.keys() & {*op.called.values(), *op.branches}:
            yield from _collectives(module, called, times * (1 if trips is None else trips))


def group_size(attributes: str, partitions: int) -> int:
    """Devices that take part in a collective together.

    Reads `{{0,1},{2,3}}`, `[2,4]<=[8]` and `mesh['a'=2,'b'=4] {'b'}` of `replica_groups`.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if tiled:
        return int(tiled[2])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if meshed:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed[1]))
        # A part of an axis is written 'a':(before)size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", meshed[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return partitions


def ring_bytes(kind: str, operands: float, results: float, size: int) -> float:
    """Bytes that a device sends in a collective of `size` devices, by the ring algorithms (Chan et
    al. 2007, "Collective communication: theory, practice, and experience")."""
    share = (size - 1) / size
    if kind == "all-gather":
        return results * share
    if kind == "all-reduce":
        return 2 * operands * share
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return operands * share
    return operands


def _largest(costs: Iterable[Cost]) -> Cost:
    """The worst of several branches, for each kind of cost on its own."""
    branches = list(costs)
    kinds = {kind for c in branches for kind in c.collectives}
    traffic = {
        kind: max((c.collectives.get(kind, Traffic()) for c in branches), key=lambda c: c.sent)
        for kind in sorted(kinds)
    }
    return Cost(
        max(c.flops for c in branches),
        max(c.bytes for c in branches),
        traffic,
        max(c.open_loops for c in branches),
        max(c.kernels for c in branches),
    )


def _bytes(types: Iterable[ArrayType]) -> float:
    return sum((array.bytes for array in types), 0.0)


def _in_main_memory(types: tuple[ArrayType, ...]) -> bool:
    return any(array.space == MAIN_MEMORY for array in types)


def _main_bytes(types: Iterable[ArrayType]) -> float:
    return sum((array.bytes for array in types if array.space == MAIN_MEMORY), 0.0)


def _plain_bytes(where: Computation, op: Instruction) -> float:
    """Bytes of an instruction that stands alone."""
    results = _main_bytes(op.types)
    if op.opcode in _SLICES:
        return 2 * results
    if op.opcode in _UPDATES:
        part = _main_bytes(where.types_of(op.operands[_UPDATES[op.opcode]]))
        return (3 if op.opcode == "scatter" else 2) * part
    if op.opcode == "copy-start":
        # Its result holds source and target.
        return results
    if op.opcode in ("while", "conditional"):
        return 0.0
    return results + sum(_main_bytes(where.types_of(name)) for name in op.operands)
