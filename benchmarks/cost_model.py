"""What programs of a run take on this machine, beside what their compiled text says of them.

    python benchmarks/cost_model.py [--recipe needle_rl] [--set KEY=VALUE ...] [--clock cpu]

Products and bytes are counted as `--compile-only` counts them; the machine's limits are measured
here, by one large product of float32 matrices and by the sum of a large array. Predicted is the
roofline: the longer of the two. Programs run on made-up numbers, which take as long as real ones:
every chunk of the head is computed, every row draws as many tokens as a call may. `--clock cpu`
takes processor time, for the limits, too, where others run beside.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paravt_jax.mesh import make_mesh, parse_mesh
from train.checks import EXAMPLE
from train.compile.chips import Chip
from train.compile.cost import program_cost
from train.compile.hlo import read
from train.compile.measure import Measured
from train.compile.program import Program
from train.compile.programs import programs_of
from train.recipes import get_recipe
from train.settings.override import override

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
INTEGER, FLOAT = 16, 0.01
"""What arrays hold: lengths, limits and tokens that every program can work with."""


@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """Takes the time of functions."""

    clock: str
    repeats: int

    def __call__(self, run: Callable[..., Any], make: Callable[[], tuple[Any, ...]]) -> float:
        """Median of some runs on arguments made anew, after one that is not counted; seconds."""
        now, taken = CLOCKS[self.clock], []
        for _ in range(self.repeats + 1):
            arguments = jax.block_until_ready(make())
            began = now()
            jax.block_until_ready(run(*arguments))
            taken.append(now() - began)
        return statistics.median(taken[1:])


def machine(seconds: Stopwatch, size: int = 2048, count: int = 2**26) -> Chip:
    """The limits of one device of this machine."""
    x, y = jnp.ones((size, size)), jnp.ones(count)
    flops = 2.0 * size**3 / seconds(jax.jit(lambda x: x @ x), lambda: (x,))
    bandwidth = y.nbytes / seconds(jax.jit(jnp.sum), lambda: (y,))
    return Chip("this machine", flops, memory=float("inf"), bandwidth=bandwidth, links=1.0)


def made_up(like: Any) -> jax.Array:
    """An array of this shape."""
    value = True if like.dtype == bool else INTEGER
    return jnp.full(
        like.shape, FLOAT if jnp.issubdtype(like.dtype, jnp.floating) else value, like.dtype
    )


def measured(program: Program, chip: Chip, seconds: Stopwatch) -> tuple[Measured, float]:
    """The figures of a program and the seconds of a call, of decoding those of a token."""
    with jax.set_mesh(program.mesh):
        lowered = program.lower()
        compiled = lowered.compile()
        (arguments, _) = lowered.args_info

        # New ones each time: some are donated.
        taken = seconds(compiled, lambda: jax.tree.map(made_up, arguments)) / program.drawn
    cost = program_cost(read(compiled.as_text()), program.drawn)
    return Measured(program, chip, 0.0, cost=cost), taken


def main() -> None:
    """Print a row for each program."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--recipe", default="needle_rl")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    seconds = Stopwatch(arguments.clock, arguments.repeats)
    chip, config = machine(seconds), override(get_recipe(arguments.recipe), arguments.set)
    print(f"{chip.flops / 1e9:,.0f} GFLOP/s, {chip.bandwidth / 1e9:.1f} GB/s")
    print("| program | GFLOP | GB moved | predicted s | bound by | measured s | of the roofline |")
    print("|---|--:|--:|--:|---|--:|--:|")
    mesh = make_mesh(parse_mesh(None, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        programs = programs_of(config, mesh, [EXAMPLE])
    for program in programs:
        if program.calls:
            found, taken = measured(program, chip, seconds)
            assert found.cost is not None
            row = (
                *(program.name, f"{found.cost.flops / 1e9:.3g}", f"{found.cost.bytes / 1e9:.3g}"),
                *(f"{found.seconds:.3g}", found.bound, f"{taken:.3g}"),
                f"{found.seconds / taken:.0%}",
            )
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
