"""What the products of a compiled program multiply: dots, convolutions, kernels."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from train.compile.hlo import Computation, Instruction

_TOLD = re.compile(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)')
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
_ATTENTION = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
"""Products of a block of queries with one of keys in each kernel of JAX's splash attention, which
does not say what it costs."""


def flops(where: Computation, op: Instruction) -> float:
    """Floating-point operations of the product that an instruction is; 0 for others."""
    counts: dict[str, Callable[[Computation, Instruction], float]] = {
        "dot": _dot_flops,
        "convolution": _convolution_flops,
        "custom-call": _kernel_flops,
        "ragged-dot": _ragged_flops,
    }
    return counts[op.opcode](where, op) if op.opcode in counts else 0.0


def _dot_flops(where: Computation, op: Instruction) -> float:
    left = where.types_of(op.operands[0])[0]
    summed = math.prod(left.dims[axis] for axis in op.numbers("lhs_contracting_dims"))
    return 2.0 * op.types[0].count * summed


def _ragged_flops(where: Computation, op: Instruction) -> float:
    """Each row meets one matrix of those on the right."""
    left, right = (where.types_of(name)[0] for name in op.operands[:2])
    return 2.0 * left.count * right.dims[-1]


def _convolution_flops(where: Computation, op: Instruction) -> float:
    """A TPU's products are convolutions, whose batch dimensions stand as dilated windows: what they
    multiply with padding is not counted, as the compiler does not count it."""
    left, right = (where.types_of(name)[0] for name in op.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None
    batch = left.dims[labels[1].index("b")]
    inputs, outputs = (right.dims[labels[2].index(letter)] for letter in "io")
    grouped = re.search(r"batch_group_count=(\d+)", op.attributes)
    pairs = 1.0
    for number, window in enumerate(_windows(op.attributes)):
        letter = str(number)
        pairs *= window.places(
            left.dims[labels[1].index(letter)], op.types[0].dims[labels[3].index(letter)]
        )
    return 2.0 * inputs * outputs * (batch // int(grouped[1] if grouped else 1)) * pairs


@dataclasses.dataclass(frozen=True)
class _Window:
    """A convolution's window along one axis."""

    size: int
    stride: int = 1
    pad: int = 0
    left_dilation: int = 1
    right_dilation: int = 1

    def places(self, length: int, outputs: int) -> int:
        """Pairs of an output and a place of the window that meet an element, not padding."""
        at = np.arange(outputs)[:, None] * self.stride - self.pad
        at = at + np.arange(self.size) * self.right_dilation
        inside = (at >= 0) & (at <= (length - 1) * self.left_dilation)
        return int(np.sum(inside & (at % self.left_dilation == 0)))


def _windows(attributes: str) -> list[_Window]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}
    if "size" not in fields:
        return []
    sizes = fields["size"].split("x")

    def column(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(sizes)

    return [
        _Window(int(size), int(stride), int(pad.split("_")[0]), int(left), int(right))
        for size, stride, pad, left, right in zip(
            sizes,
            column("stride", "1"),
            column("pad", "0_0"),
            column("lhs_dilate", "1"),
            column("rhs_dilate", "1"),
            strict=True,
        )
    ]


def _kernel_flops(where: Computation, op: Instruction) -> float:
    """Of a kernel what it says itself; of a library's matrix product what its shapes say."""
    match = _TOLD.search(op.attributes)
    if match:
        return float(match[1])
    product = _GEMM.search(op.attributes)
    if product:
        left = where.types_of(op.operands[0])[0]
        axes = [int(axis) for axis in re.findall(r"\d+", product[1])]
        return 2.0 * op.types[0].count * math.prod(left.dims[axis] for axis in axes)
    return _attention_flops(where, op)


def _attention_flops(where: Computation, op: Instruction) -> float:
    """As causal attention: half of all pairs of a query and a key. Which blocks a mask really
    leaves out does not stand in the text."""
    products = next((n for name, n in _ATTENTION.items() if op.name.startswith(name)), 0)
    arrays = [kind for name in op.operands for kind in where.types_of(name)]
    blocks = [kind.dims for kind in arrays if "f" in kind.dtype and len(kind.dims) == 3]
    if not products or len(blocks) < 2:
        return 0.0
    (heads, queries, width), (_, keys, _) = blocks[:2]
    return products * 2.0 * heads * queries * keys * width / 2


def is_silent_kernel(op: Instruction) -> int:
    """1 for a kernel of which nobody knows what it multiplies."""
    if op.opcode != "custom-call" or "tpu_custom_call" not in op.attributes:
        return 0
    tells = _TOLD.search(op.attributes) or op.name.startswith(tuple(_ATTENTION))
    return int(not tells)
