"""What is largest in a compiled program: arrays in main memory, and what collectives give."""

from __future__ import annotations

from collections.abc import Mapping

from train.compile.chips import GIB
from train.compile.cost import collectives
from train.compile.hlo import MAIN_MEMORY, ArrayType, Module

COUNT = 5
_MAKE_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "optimization-barrier", "opt-barrier", "custom-call-start", "async-start"),
}
"""Instructions whose results were there before, or are named elsewhere, too."""


def largest_arrays(module: Module) -> list[str]:
    """Arrays that are made beside the arguments, one of each shape: where memory goes."""
    instructions = [op for where in module.computations.values() for op in where.instructions]
    within = {op.called["calls"] for op in instructions if op.opcode == "fusion"}
    sizes = {
        _text(kind): kind.bytes
        for name, where in module.computations.items()
        if name not in within
        for op in where.instructions
        if op.opcode not in _MAKE_NOTHING
        for kind in op.types
        if kind.space == MAIN_MEMORY
    }
    return _first(sizes)


def largest_collectives(module: Module) -> list[str]:
    """Collectives of a kind and shape by what they give in one run, all branches taken."""
    sizes: dict[str, float] = {}
    times: dict[str, int] = {}
    for op, count in collectives(module):
        text = f"{op.opcode.removesuffix('-start')} {_text(op.types[-1])}"
        times[text] = times.get(text, 0) + count
        sizes[text] = sizes.get(text, 0.0) + count * op.types[-1].bytes
    return _first({f"{times[text]:,} x {text}": size for text, size in sizes.items()})


def _text(kind: ArrayType) -> str:
    return f"{kind.dtype}[{','.join(map(str, kind.dims))}]"


def _first(sizes: Mapping[str, float]) -> list[str]:
    largest = sorted(sizes, key=lambda text: -sizes[text])[:COUNT]
    return [f"{text} {sizes[text] / GIB:.2f} GiB" for text in largest]
