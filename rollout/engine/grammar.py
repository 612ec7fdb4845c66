"""What may be written, as automata over bytes: stop strings, and responses with tool calls.

A grammar is put together from parts. A part adds itself to an automaton with free moves, from
a given node to the node that it returns; the subset construction then makes it deterministic
(Hopcroft, Motwani and Ullman, "Introduction to Automata Theory", sections 2.3 and 3.2).
Tool calls are finite up to the length of texts, so no stack is needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from paravt_jax.protocol import THINK_OPEN, CallSyntax, call_syntax
from paravt_jax.pytrees import ArrayLike
from paravt_jax.shaping import DEAD

LONGEST_SPACE = 2
"""Most white space between two parts of a tool call: a model must not loop in it."""
LONGEST_NUMBER = 15
"""Most digits before, and after, the point of a number: what a double holds exactly."""
NODES_PER_STATE = 64
"""Nodes of an automaton with choices to each state of the deterministic one, far more than calls
need, after which it is given up."""

_SPACE = b" \n\r\t"
_DIGITS = b"0123456789"
_ANNOTATIONS = {"description", "title", "default", "examples", "deprecated", "$comment"}


@dataclasses.dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton over bytes. It starts in state 0."""

    moves: Int[ArrayLike, "state 256"]
    """State after a byte; `DEAD` if none."""
    ends: Bool[ArrayLike, " state"]
    """Where the text is complete."""

    def read(self, text: bytes) -> int:
        """State after `text`, which may be `DEAD`."""
        state = 0
        for byte in text:
            if state != DEAD:
                state = int(self.moves[state, byte])
        return state


def finder(strings: Sequence[str]) -> ByteAutomaton:
    """Reads any text and stays in an end from the first time that one of `strings` occurs.

    Raises:
        ValueError: a string is empty.
    """
    moves, matches = _search(strings)
    ends = matches >= 0
    moves[ends] = np.flatnonzero(ends)[:, None]
    return ByteAutomaton(moves, ends)


def response_grammar(
    tools: Sequence[Mapping[str, Any]], syntax: str = "tool_call"
) -> ByteAutomaton:
    """An assistant turn: `<think>`, then free text and calls of the `tools`, in any mix.

    Free text holds neither tag of a call; a call is one JSON object with the tool's name and
    arguments in the order of its schema, strings in it do not hold `<` but its escape, so that
    no tag can hide in one. The turn may end anywhere but inside a call.

    Args:
        tools: function schemas in the form that chat templates take.
        syntax: how calls are written (`paravt_jax.protocol.SYNTAXES`). Where it means one tool
            alone, the JSON object is that tool's arguments.

    Raises:
        ValueError: no tools, or a schema says what this grammar cannot promise.
    """
    nodes, form = _Nodes(), call_syntax(syntax)
    think = _text(THINK_OPEN)(nodes, 0)
    call = nodes.new()
    free = _free_text(nodes, call, form)
    nodes.skip(think, free[0])
    nodes.skip(_calls(tools, form)(nodes, call), free[0])
    return nodes.determinise(ends=free)


def call_grammar(
    tools: Sequence[Mapping[str, Any]], syntax: str = "tool_call", most: int | None = None
) -> ByteAutomaton:
    """One call of one of the `tools`, from behind its opening tag to the end of its closing one.

    Args:
        tools: see `response_grammar`.
        most: states that it may have. A schema of a few lines can ask for millions of them.

    Raises:
        ValueError: as `response_grammar`, or more states are needed.
    """
    nodes = _Nodes(most)
    end = _calls(tools, call_syntax(syntax))(nodes, 0)
    return nodes.determinise(ends=[end])


def _search(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`(moves [state, 256], matches [state])`: the automaton that searches all strings at once.

    A state is the longest suffix of the text that begins one of the strings; `matches` is the
    index of a string that the text ends with, or -1.
    Source: Aho and Corasick 1975 (doi:10.1145/360825.360855).
    """
    needles = [string.encode() for string in strings]
    if not all(needles):
        raise ValueError(f"stop={tuple(strings)}: an empty text is found everywhere; leave it out")
    begun = sorted({needle[:end] for needle in needles for end in range(len(needle) + 1)}, key=len)
    state_of = {prefix: state for state, prefix in enumerate(begun)}
    moves = np.zeros((len(begun), 256), np.int64)
    matches = np.full(len(begun), -1)
    for prefix, state in state_of.items():
        # Shorter suffixes have their moves already, all but the ones to longer prefixes.
        shorter = next((s for at in range(1, len(prefix)) if (s := state_of.get(prefix[at:]))), 0)
        moves[state], matches[state] = moves[shorter], matches[shorter]
        for child, target in state_of.items():
            if len(child) == len(prefix) + 1 and child.startswith(prefix):
                moves[state, child[-1]] = target
        matches[state] = needles.index(prefix) if prefix in needles else matches[state]
    return moves, matches


class _Nodes:
    """An automaton with choices and free moves, as it grows. Node 0 is its start."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: states that the deterministic one may have."""
        self.arcs: list[list[tuple[Iterable[int], int]]] = [[]]
        self.skips: list[list[int]] = [[]]
        self._most = most

    def new(self) -> int:
        self._check(len(self.arcs) // NODES_PER_STATE)
        self.arcs.append([])
        self.skips.append([])
        return len(self.arcs) - 1

    def arc(self, start: int, bytes_: Iterable[int], end: int) -> None:
        """Any of the bytes leads from `start` to `end`."""
        self.arcs[start].append((bytes_, end))

    def skip(self, start: int, end: int) -> None:
        """`start` leads to `end` without a byte."""
        self.skips[start].append(end)

    def determinise(self, ends: Iterable[int]) -> ByteAutomaton:
        """The subset construction. Every state is a set of nodes in which the text may be."""
        numbers = {self._reach([0]): 0}
        rows: list[list[int]] = []
        while len(rows) < len(numbers):
            self._check(len(numbers))
            subset = list(numbers)[len(rows)]
            row = [DEAD] * 256
            for byte, targets in self._targets(subset).items():
                row[byte] = numbers.setdefault(self._reach(targets), len(numbers))
            rows.append(row)
        final = set(ends)
        return ByteAutomaton(np.array(rows), np.array([not final.isdisjoint(s) for s in numbers]))

    def _check(self, states: int) -> None:
        if self._most is not None and states > self._most:
            raise ValueError(f"tools: calls take more than {self._most} states; make them simpler")

    def _targets(self, subset: Iterable[int]) -> dict[int, list[int]]:
        """Nodes after each byte that has any."""
        targets: dict[int, list[int]] = {}
        for node in subset:
            for bytes_, end in self.arcs[node]:
                for byte in bytes_:
                    targets.setdefault(byte, []).append(end)
        return targets

    def _reach(self, nodes: Iterable[int]) -> frozenset[int]:
        """The nodes and whatever free moves lead to."""
        reached, waiting = set(), list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += self.skips[node]
        return frozenset(reached)


Part = Callable[[_Nodes, int], int]
"""Adds itself to the nodes after a given one; returns the node behind it."""


def _one_of(bytes_: Iterable[int]) -> Part:
    def add(nodes: _Nodes, start: int) -> int:
        nodes.arc(start, bytes_, end := nodes.new())
        return end

    return add


def _text(text: str) -> Part:
    return _chain(*(_one_of([byte]) for byte in text.encode()))


def _chain(*parts: Part) -> Part:
    def add(nodes: _Nodes, start: int) -> int:
        for part in parts:
            start = part(nodes, start)
        return start

    return add


def _either(*parts: Part) -> Part:
    def add(nodes: _Nodes, start: int) -> int:
        end = nodes.new()
        for part in parts:
            nodes.skip(part(nodes, start), end)
        return end

    return add


def _repeat(part: Part, least: int, most: int | None = None) -> Part:
    """`part` between `least` and `most` times; without `most`, any number of times."""

    def add(nodes: _Nodes, start: int) -> int:
        for _ in range(least):
            start = part(nodes, start)
        if most is None:
            # A node of its own: the loop must not enter what else leaves or meets `start`.
            nodes.skip(start, loop := nodes.new())
            nodes.skip(part(nodes, loop), loop)
            return loop
        end = nodes.new()
        nodes.skip(start, end)
        for _ in range(most - least):
            nodes.skip(start := part(nodes, start), end)
        return end

    return add


def _optional(part: Part) -> Part:
    return _repeat(part, 0, 1)


def _listed(parts: Sequence[Part]) -> Part:
    """The parts one after the other with commas between."""
    commas = [part for later in parts[1:] for part in (_COMMA, later)]
    return _chain(*parts[:1], *commas)


def _free_text(nodes: _Nodes, call: int, syntax: CallSyntax) -> list[int]:
    """Nodes of text without tags of calls, the first of them its start.

    The opening tag leads to `call`, the closing one nowhere.
    """
    moves, matches = _search([syntax.open, syntax.close])
    states = [call if tag == 0 else nodes.new() for tag in matches]
    for state in np.flatnonzero(matches < 0):
        for target in np.unique(moves[state]):
            if matches[target] != 1:
                bytes_ = np.flatnonzero(moves[state] == target).tolist()
                nodes.arc(states[state], bytes_, states[target])
    return [node for node, tag in zip(states, matches, strict=True) if tag < 0]


_GAP = _repeat(_one_of(_SPACE), 0, LONGEST_SPACE)
_COMMA = _chain(_GAP, _text(","), _GAP)
_TAIL = _one_of(range(0x80, 0xC0))
# Well-formed UTF-8 (RFC 3629, section 4) without control characters, `"`, `\` and `<`.
_CHARACTER = _either(
    _one_of([byte for byte in range(0x20, 0x80) if byte not in b'"\\<']),
    _chain(_one_of(range(0xC2, 0xE0)), _TAIL),
    _chain(_one_of([0xE0]), _one_of(range(0xA0, 0xC0)), _TAIL),
    _chain(_one_of([*range(0xE1, 0xED), 0xEE, 0xEF]), _TAIL, _TAIL),
    _chain(_one_of([0xED]), _one_of(range(0x80, 0xA0)), _TAIL),
    _chain(_one_of([0xF0]), _one_of(range(0x90, 0xC0)), _TAIL, _TAIL),
    _chain(_one_of(range(0xF1, 0xF4)), _TAIL, _TAIL, _TAIL),
    _chain(_one_of([0xF4]), _one_of(range(0x80, 0x90)), _TAIL, _TAIL),
)
_HEX = _one_of(b"0123456789abcdefABCDEF")
_ESCAPE = _chain(
    _text("\\"), _either(_one_of(b'"\\/bfnrt'), _chain(_text("u"), _repeat(_HEX, 4, 4)))
)
_STRING = _chain(_text('"'), _repeat(_either(_CHARACTER, _ESCAPE), 0), _text('"'))
_MORE_DIGITS = _repeat(_one_of(_DIGITS), 0, LONGEST_NUMBER - 1)
_INTEGER = _chain(
    _optional(_text("-")), _either(_text("0"), _chain(_one_of(b"123456789"), _MORE_DIGITS))
)
_FRACTION = _chain(_text("."), _one_of(_DIGITS), _MORE_DIGITS)
_EXPONENT = _chain(_one_of(b"eE"), _optional(_one_of(b"+-")), _repeat(_one_of(_DIGITS), 1, 2))
_SIMPLE: dict[str, Part] = {
    "string": _STRING,
    "integer": _INTEGER,
    "number": _chain(_INTEGER, _optional(_FRACTION), _optional(_EXPONENT)),
    "boolean": _either(_text("true"), _text("false")),
    "null": _text("null"),
}
"""The JSON values (RFC 8259) that have no parts."""


def _calls(tools: Sequence[Mapping[str, Any]], syntax: CallSyntax) -> Part:
    """A call of one of the tools, from behind its opening tag."""
    if not tools:
        raise ValueError("tools=(): a grammar of tool calls needs at least one schema")
    calls = _either(*(_call(tool.get("function", tool), syntax) for tool in tools))
    return _chain(calls, _text(syntax.close))


def _call(function: Mapping[str, Any], syntax: CallSyntax) -> Part:
    """What stands between the tags of a call."""
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    name, arguments = _constant(function["name"]), _value(parameters, function["name"])
    if syntax.tool:
        return _chain(_GAP, arguments, _GAP)
    fields = [_field("name", name), _field("arguments", arguments)]
    return _chain(_GAP, _braced("{", _listed(fields), "}"), _GAP)


def _field(name: str, value: Part) -> Part:
    return _chain(_constant(name), _GAP, _text(":"), _GAP, value)


def _braced(opening: str, inside: Part, closing: str) -> Part:
    return _chain(_text(opening), _GAP, inside, _GAP, _text(closing))


def _constant(value: Any) -> Part:
    return _text(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))


def _value(schema: Mapping[str, Any], where: str) -> Part:
    """A JSON value of the schema; `where` names it in errors."""
    kinds = schema.get("type", [])
    keywords = {"type", "enum", "const"} if "enum" in schema or "const" in schema else {"type"}
    keywords |= {"properties", "required", "additionalProperties"} if "object" in kinds else set()
    keywords |= {"items", "minItems", "maxItems"} if "array" in kinds else set()
    if unknown := sorted(set(schema) - keywords - _ANNOTATIONS):
        raise ValueError(f"tool schema {where}: {unknown} cannot be promised; take it out")
    if "const" in schema or "enum" in schema:
        return _either(*map(_constant, schema.get("enum", [schema.get("const")])))
    if not kinds:
        raise ValueError(f'tool schema {where}: say its "type"')
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return _either(*(_of_kind(kind, schema, where) for kind in kinds))


def _of_kind(kind: str, schema: Mapping[str, Any], where: str) -> Part:
    if kind == "object":
        return _braced("{", _fields(schema, where), "}")
    if kind == "array":
        if "items" not in schema:
            raise ValueError(f'tool schema {where}: an array needs "items"')
        return _braced("[", _items(schema, where), "]")
    if kind not in _SIMPLE:
        raise ValueError(f"tool schema {where}: type {kind!r} is none of JSON's")
    return _SIMPLE[kind]


def _items(schema: Mapping[str, Any], where: str) -> Part:
    """Values of one schema with commas between, as few and as many as it allows."""
    item = _value(schema["items"], f"{where}[]")
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if most is not None and not most >= max(least, 1):
        raise ValueError(f"tool schema {where}: maxItems={most} must be at least 1 and minItems")
    more = _repeat(_chain(_COMMA, item), max(least - 1, 0), None if most is None else most - 1)
    some = _chain(item, more)
    return some if least else _optional(some)


def _fields(schema: Mapping[str, Any], where: str) -> Part:
    """The properties in their order; those that are not required may be left out."""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if missing := sorted(set(required) - set(properties)):
        raise ValueError(f"tool schema {where}: required {missing} are not among its properties")
    fields = [
        (_field(name, _value(property_schema, f"{where}.{name}")), name in required)
        for name, property_schema in properties.items()
    ]
    # One choice for each field that can come first: all before it are left out.
    choices = []
    for at, (first, needed) in enumerate(fields):
        rest = [_chain(_COMMA, part) for part, _ in fields[at + 1 :]]
        must = [needed for _, needed in fields[at + 1 :]]
        later = (part if m else _optional(part) for part, m in zip(rest, must, strict=True))
        choices.append(_chain(first, *later))
        if needed:
            return _either(*choices)
    return _optional(_either(*choices)) if choices else _chain()
