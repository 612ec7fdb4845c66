"""What `--compile-only` says of the programs of a run: a table for people, the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from paravt_jax.mesh import axes_text
from train.compile.chips import GIB, Chip
from train.compile.measure import Measured
from train.compile.step import REACHED, SHARES, step_by_share

_COLUMNS = (
    *("program", "calls", "arguments", "temporary", "outputs", "code", "beside", "GiB of chip"),
    *("TFLOP", "GB moved", "GB sent", "seconds", "bound by", "compiled"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The programs of a run on one topology."""

    topology: str
    mesh: Mesh
    measured: Sequence[Measured]
    rollouts: int
    """Of a step; 0 without any."""
    generated: int
    """Most tokens that each of them generates."""
    calls: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How often a step calls each program, those included that are not compiled."""
    rollout_mesh: Mesh | None = None
    """That of the rollouts; None without any."""

    @property
    def chip(self) -> Chip | None:
        """What the devices can do, if that is known."""
        return self.measured[0].chip if self.measured else None

    @property
    def misfits(self) -> list[Measured]:
        """Programs that there is no room for."""
        return [result for result in self.measured if not result.fits]

    def text(self) -> str:
        """For people."""
        lines = [self._head(), *_table([_COLUMNS, *map(_cells, self.measured)])]
        lines += [line for result in self.measured for line in _collectives(result)]
        lines += [line for result in self.measured for line in _doubts(result)]
        return "\n".join([*lines, *self._steps()])

    def json(self) -> dict[str, Any]:
        """For programs; bytes, seconds and operations, per chip and call."""
        figures = self._figures()
        return figures | {"step_by_share_of_limits": step_by_share(figures)}

    def _figures(self) -> dict[str, Any]:
        return {
            "topology": self.topology,
            "mesh": dict(self.mesh.shape),
            "rollout_mesh": dict(self.rollout_mesh.shape) if self.rollout_mesh else None,
            "chips": self.mesh.size,
            "chip": dataclasses.asdict(self.chip) if self.chip else None,
            "rollouts": self.rollouts,
            "generated": self.generated,
            "calls": dict(self.calls),
            "programs": {result.program.name: _entry(result) for result in self.measured},
        }

    def _head(self) -> str:
        axes, chip = axes_text(self.mesh), self.chip
        if self.rollout_mesh not in (None, self.mesh):
            axes += f", rollouts {axes_text(self.rollout_mesh)}"
        if chip is None:
            kind = self.mesh.devices.flat[0].device_kind
            return f"{self.topology} as {axes}: nothing is known of the limits of {kind}"
        return (
            f"{self.topology} as {axes}: {self.mesh.size} x {chip.name} of "
            f"{chip.memory / GIB:.2f} GiB, {chip.flops / 1e12:.0f} TFLOP/s, "
            f"{chip.bandwidth / 1e9:,.0f} GB/s of memory, {chip.links / 1e9:.0f} GB/s of links"
        )

    def _steps(self) -> list[str]:
        if self.misfits:
            return []
        summaries = step_by_share(self._figures(), SHARES if self.generated else (1.0,))
        return [line for share, step in summaries.items() for line in self._step_lines(share, step)]

    def _step_lines(self, share: float, step: dict[str, Any]) -> tuple[str, str]:
        length = f"rollouts of {share * self.generated:,.0f} tokens: " if self.generated else ""
        rollout = f"rollout {step['rollout']:.2f} s + " if self.generated else ""
        spoken = f", {step['generated_per_second_and_chip']:.1f} generated" if length else ""
        roofline = (
            f"step at the roofline, {length}{step['seconds']:.2f} s ({rollout}learner "
            f"{step['learner']:.2f} s); {step['learned_per_second_and_chip']:,.0f} learner tokens"
            f"{spoken} per second and chip; MFU {step['mfu']:.1%}, "
            f"learner {step['learner_mfu']:.1%}"
        )
        return roofline, f"  {expected_text(step)}"


def expected_text(summary: Mapping[str, Any]) -> str:
    """Seconds of each program of a step that reaches `REACHED`, those that take any."""
    terms = summary["expected_by_program"].items()
    return (
        f"{summary['expected_seconds']:.1f} s with decoding at {REACHED['decode']:.0%} of the "
        f"roofline and all else at {REACHED['other']:.0%}: "
        f"{' + '.join(f'{name} {seconds:.2f}' for name, seconds in terms if seconds >= 0.005)}"
    )


def misfit_line(result: Measured, topology: str) -> str:
    """What does not fit, and by how much."""
    assert result.chip is not None or result.needed is not None
    limit = f" of {result.chip.memory / GIB:.2f}" if result.chip else ""
    if result.memory is None:
        needs = f"{result.needed / GIB:.1f}{limit} GiB" if result.needed else "more than there is"
        beside = (
            f" and {result.program.beside / GIB:.1f} GiB beside it" if result.program.beside else ""
        )
        return f"{topology}: {result.program.name} does not fit: needs {needs}{beside}"
    return (
        f"{topology}: {result.program.name} does not fit: needs "
        f"{result.memory.together / GIB:.1f}{limit} GiB, of which "
        f"{result.memory.beside / GIB:.1f} lie beside it"
    )


def _cells(result: Measured) -> tuple[str, ...]:
    program, memory, cost = result.program, result.memory, result.cost
    head = program.name, f"{program.calls:,.3g}" if program.calls < 1 else f"{program.calls:,.0f}"
    compiled = f"{result.seconds_to_compile:.0f} s"
    if memory is None or cost is None:
        return *head, *["-"] * 5, "does not fit", *["-"] * 5, compiled
    sizes = [f"{x / GIB:.2f}" for x in dataclasses.astuple(memory)]
    mark = "" if result.fits else " !"
    timed = (f"{result.seconds:.2e}", result.bound) if result.limits else ("-", "-")
    return (
        *head,
        *sizes,
        f"{memory.together / GIB:.2f}{mark}",
        f"{cost.flops / 1e12:.3g}",
        f"{cost.bytes / 1e9:.3g}",
        f"{cost.sent / 1e9:.3g}",
        *timed,
        compiled,
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _collectives(result: Measured) -> list[str]:
    """One line for a program that has any."""
    if result.cost is None or not result.cost.collectives:
        return []
    unit = "token" if result.program.name.startswith("decode") else "call"
    kinds = [
        f"{kind} {traffic.count:,.0f} x, {traffic.bytes / GIB:.3g} GiB"
        for kind, traffic in result.cost.collectives.items()
    ]
    return [f"{result.program.name}, collectives per {unit} and chip: {'; '.join(kinds)}"]


def _doubts(result: Measured) -> list[str]:
    """What is to be said of one that does not fit, or that is not wholly counted."""
    name, doubts = result.program.name, []
    if result.cost is not None and result.cost.kernels:
        doubts += [f"{name}: {result.cost.kernels} kernels do not say what they multiply"]
    if result.arrays and not result.fits:
        doubts += [f"{name}, largest arrays: {'; '.join(result.arrays)}"]
    return doubts


def _entry(result: Measured) -> dict[str, Any]:
    program, cost = result.program, result.cost
    entry: dict[str, Any] = {
        "calls": program.calls,
        "part": program.part,
        "spoken": program.spoken,
        "tokens": program.tokens,
        "model_flops": program.model_flops,
        "seconds_to_compile": result.seconds_to_compile,
        "fits": result.fits,
        "needed_bytes": result.needed,
    }
    if result.memory is None or cost is None:
        return entry
    return entry | {
        "memory": dataclasses.asdict(result.memory) | {"together": result.memory.together},
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collectives": {k: dataclasses.asdict(v) for k, v in cost.collectives.items()},
        "largest_arrays": list(result.arrays),
        "largest_collectives": list(result.moved),
        "silent_kernels": cost.kernels,
        "seconds": result.seconds,
        "seconds_by_limit": result.limits,
    }
