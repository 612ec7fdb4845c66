"""The optimiser: its settings, its learning rate over the run, and what decays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal

import optax

from paravt_jax.marks import Mark
from paravt_jax.moments import Kept, keep_moments
from paravt_jax.params import ParamSpec, Table
from paravt_jax.parts import Part
from paravt_jax.ranges import above, at_least, below, within
from paravt_jax.settings import Refused, Settings


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Optax optimiser. Master weights are float32."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for matrices with AdamW for the rest."""
    learning_rate: Annotated[float, above(0), Mark.MAY_CHANGE] = 2e-6
    """Largest learning rate, at the end of the warm-up."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Optimiser steps over which the rate rises evenly: the first has 1/warmup_steps of it, the
    last of them all."""
    decay: Literal["constant", "cosine"] = "constant"
    """`constant`, or `cosine` down to `final_fraction` of the learning rate."""
    decay_steps: Annotated[int | None, at_least(1), Mark.MAY_CHANGE] = None
    """Optimiser steps, warm-up included, after which a cosine has reached its end and stays there;
    none takes all of the run's."""
    final_fraction: Annotated[float, within(0, 1)] = 0.0
    """Share of the learning rate that is left at the end of a cosine."""
    b1: Annotated[float, below(0, 1)] = 0.9
    """Decay per step of the mean of gradients; with Muon, of those that Adam takes."""
    b2: Annotated[float, below(0, 1)] = 0.999
    """Decay per step of the mean of their squares."""
    eps: Annotated[float, above(0)] = 1e-8
    """Added to the root of that mean before dividing by it."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """Decay of matrices. Norms, biases and embeddings do not decay."""
    clip_norm: Annotated[float | None, above(0)] = 1.0
    """Largest global norm of a gradient; none clips nothing."""
    groups: tuple[Part, ...] = ()
    """Parts with learning rates of their own (`paravt_jax.parts`)."""
    rates: Annotated[tuple[float, ...], above(0)] = ()
    """Share of the learning rate for each of `groups`, weight decay included."""
    moments: Kept = "float32"
    """What both means are kept in between steps: `float32`, 8 bytes for each weight that trains;
    `bfloat16`, 4; `int8`, 2 and a scale for each 256 (Dettmers et al., 2022)."""

    def check_together(self) -> None:
        """Refuse groups without a rate, and a part in two groups."""
        if len(self.groups) != len(self.rates):
            raise Refused(self, "{groups} with {rates}: give a rate for each group")
        if len(set(self.groups)) < len(self.groups):
            raise Refused(self, "{groups}: name each part once")


def make_optimizer(
    settings: OptimizerSettings, steps: int, table: Table
) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW or Muon under the schedule of `steps`."""
    rate = learning_rate(settings, steps)
    if settings.name == "muon":
        update = optax.contrib.muon(
            rate,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            # Steps as large as Adam's (Moonlight, arXiv 2502.16982), so that one rate fits both.
            consistent_rms=0.2,
            muon_weight_dimension_numbers=functools.partial(_muon_dimensions, table=table),
        )
    else:
        update = optax.adamw(
            rate,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=functools.partial(_matrices, table=table),
        )
    if settings.groups:
        update = optax.chain(update, _scale_groups(settings, table))
    if settings.moments != "float32":
        update = keep_moments(update, settings.moments)
    if settings.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)


def _scale_groups(settings: OptimizerSettings, table: Table) -> optax.GradientTransformation:
    """Makes the steps of each group longer or shorter."""
    shares = dict(zip(settings.groups, settings.rates, strict=True))

    def scale(updates: Any, _: Any) -> Any:
        return {name: x * shares.get(table[name].part, 1.0) for name, x in updates.items()}

    return optax.stateless(scale)


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The rate of optimiser step i, counted from 0, of a run of `steps`.

    Warm-up ends at the peak and does not begin at 0, where a step would teach nothing.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.decay == "cosine":
        end = settings.decay_steps or steps
        body = optax.cosine_decay_schedule(peak, max(end - warmup, 1), settings.final_fraction)
    else:
        body = optax.constant_schedule(peak)
    if not warmup:
        return body
    rise = optax.linear_schedule(peak / warmup, peak * (1 + 1 / warmup), warmup)
    return optax.join_schedules([rise, body], [warmup])


def warm_up_note(settings: OptimizerSettings, steps: int) -> str | None:
    """What a user should know about a warm-up that is longer than the run."""
    if settings.warmup_steps <= steps:
        return None
    reached = settings.learning_rate * steps / settings.warmup_steps
    return (
        f"optimizer.warmup_steps={settings.warmup_steps} is longer than the {steps} optimiser "
        f"steps of this run: its learning rate ends at {reached:.3g} of "
        f"{settings.learning_rate:.3g}"
    )


def check_continued(
    before: OptimizerSettings, steps_before: int, now: OptimizerSettings, steps: int
) -> None:
    """Refuse to continue a cosine that would rise again, unless its new end was chosen. Of the run
    as it began and as it goes on: the settings, and its optimiser steps."""
    if now.decay != "cosine" or now.decay_steps:
        return
    end = before.decay_steps or steps_before
    if end != steps:
        raise ValueError(
            f"optimizer.decay=cosine ended at optimiser step {end}, and over {steps} steps the "
            f"rate would jump; set optimizer.decay_steps={end} to go on at its final rate, or "
            f"optimizer.decay_steps={steps} to stretch it"
        )


def is_matrix(spec: ParamSpec) -> bool:
    """Whether the parameter is (a stack of) matrices that are multiplied with, not looked up."""
    looked_up = "vocab" in spec.axes or "positions" in spec.axes
    return not looked_up and len(spec.hf_shapes[0]) >= 2


def _matrices(params: Any, table: Table) -> dict[str, bool]:
    return {name: is_matrix(table[name]) for name in params}


def _muon_dimensions(params: Any, table: Table) -> Any:
    """Muon orthogonalises matrices; embeddings, norms and biases take Adam.

    Stacked layers and experts are batches of matrices to it; what follows the input dimension of
    a kernel is output.
    """

    def dimensions(spec: ParamSpec):
        if not is_matrix(spec):
            return None
        matrix = [i for i, axis in enumerate(spec.axes) if axis not in ("layers", "expert")]
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=matrix[0], output_axis=tuple(matrix[1:])
        )

    return {name: dimensions(table[name]) for name in params}
