"""Compiles the programs of a run for chips that are elsewhere, and reads what each will cost."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from train.compile.chips import CHIPS, HERE, Chip
from train.compile.cost import Cost, program_cost
from train.compile.hlo import read
from train.compile.largest import largest_arrays, largest_collectives
from train.compile.program import Program

_NEEDED = re.compile(r"(?:Used |required for [\w ]+ \()([\d.]+)([KMGT]?)")
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip while a program runs."""

    arguments: float
    temporaries: float
    outputs: float
    """New ones: what is written over arguments is not counted again."""
    code: float
    beside: float
    """What the run holds besides."""

    @property
    def together(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self), 0.0)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program, compiled for a chip."""

    program: Program
    chip: Chip | None
    """None where nothing is known of these devices."""
    seconds_to_compile: float
    memory: Memory | None = None
    """None where the compiler gave up for want of memory."""
    cost: Cost | None = None
    needed: float | None = None
    """Bytes that the compiler would have needed where it gave up."""
    arrays: Sequence[str] = ()
    """The largest that it makes."""
    moved: Sequence[str] = ()
    """What its collectives give most of."""

    @property
    def fits(self) -> bool:
        """Whether there is room for it; True where nobody knows."""
        if self.memory is None:
            return False
        return self.chip is None or self.memory.together <= self.chip.memory

    @property
    def limits(self) -> dict[str, float]:
        """Seconds of one call that each resource of a chip takes at its peak."""
        if self.chip is None or self.cost is None:
            return {}
        return {
            "products": self.cost.flops / self.chip.flops,
            "memory": self.cost.bytes / self.chip.bandwidth,
            "links": self.cost.sent / self.chip.links,
        }

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.limits, key=self.limits.__getitem__) if self.limits else ""

    @property
    def seconds(self) -> float:
        """The roofline of one call: products, memory and links work side by side."""
        return max(self.limits.values(), default=0.0)


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a TPU topology such as `v5p:2x2x2`; of this process for `here`.

    Raises:
      ValueError: libtpu is missing, or there is no such topology.
    """
    if topology == HERE:
        return jax.devices()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise ValueError(
            f"--compile-only {topology}: {str(error).splitlines()[0]}; name topologies such as "
            f"v5p:2x2x2, for which libtpu is needed (`pip install -r requirements-scale.txt`), or "
            f"{HERE!r} for the devices of this machine, which a GPU must be"
        ) from error


def measure(program: Program, tell: Callable[[str], None]) -> Measured:
    """Compile one program for its mesh. One that does not fit is no error."""
    chip = CHIPS.get(program.mesh.devices.flat[0].device_kind)
    began = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lower().compile()
    except Exception as error:
        # The one thing that tells want of memory from a failure: its type is that of all errors of
        # XLA.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - began
        tell(f"{program.name}: does not fit, found after {seconds:.0f} s")
        return Measured(program, chip, seconds, needed=needed_bytes(str(error)))
    seconds = time.perf_counter() - began
    tell(f"{program.name}: compiled in {seconds:.0f} s")
    module, memory = read(compiled.as_text()), _memory(compiled, program.beside)
    return Measured(
        program,
        chip,
        seconds,
        memory,
        program_cost(module, program.drawn),
        arrays=largest_arrays(module),
        moved=largest_collectives(module),
    )


def needed_bytes(message: str) -> float | None:
    """What a compiler that ran out of memory says it needs: `Used 41.3G of 15.75G hbm`, or, of a
    part, `the total memory required for HLO temporaries (512.00G) exceeds`."""
    match = _NEEDED.search(message)
    return float(match[1]) * _UNITS[match[2]] if match else None


def _memory(compiled: Any, beside: float) -> Memory:
    analysis = compiled.memory_analysis()
    return Memory(
        arguments=float(analysis.argument_size_in_bytes),
        temporaries=float(analysis.temp_size_in_bytes),
        outputs=float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        code=float(analysis.generated_code_size_in_bytes),
        beside=max(beside, 0.0),
    )
