"""Settings of one RL step: how many rollouts, which of them are kept, how often they teach."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from paravt_jax.marks import Mark
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.ranges import above, at_least
from paravt_jax.settings import Refused, Settings


@dataclasses.dataclass(frozen=True)
class RlSettings(Settings):
    """Size of one RL step, and what becomes of its rollouts."""

    prompts_per_step: Annotated[int, at_least(1)] = 7
    """Prompts of one batch of rollouts."""
    group_size: Annotated[int, at_least(2, "a lone rollout has a zero advantage")] = 8
    """Rollouts per prompt (G)."""
    micro_groups: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 1
    """Groups per gradient micro-batch. Where they divide over the devices that share a batch, a
    prompt is computed once, else by as few of its rollouts together as it takes."""
    epochs: Annotated[int, at_least(1)] = 1
    """Times that a batch of rollouts is learned from."""
    minibatches: Annotated[int, at_least(1)] = 1
    """Optimiser steps of one epoch, each on a share of the prompts; always the same shares."""
    reference_every: Annotated[int, at_least(1)] = 10
    """Where the divergence from the reference has no weight: steps between those that measure it,
    each by a forward pass of the reference. `kl` of the others is that of the last one."""
    reference_memory: Annotated[Literal["device", "host"], Mark.SAME_RESULTS] = "device"
    """Where the reference's own copy of what trains lies: on the `device`, or in memory of the
    `host`, from which it is fetched whenever it is measured."""
    sight_every: Annotated[int, at_least(0)] = 0
    """Steps between measurements of how probable answers and reports are with their frames and
    without (`sight/...`): a policy that does not see finds both the same. 0: never."""
    warm_up: Annotated[bool, Mark.SAME_RESULTS] = False
    """Compile what steps can need before the first one, not when it first occurs: a run that never
    stops for it, for a later start."""
    staleness: Annotated[int, at_least(0)] = 0
    """Steps by which the weights that draw a step's rollouts may be behind those that learn from
    them: with 1 or more, rollouts of the next steps are drawn while this one learns
    (docs/adr/0035); 0 draws and learns in turn."""
    in_flight_updates: Annotated[int, at_least(0)] = 0
    """How often, at most, rollouts that are under way go on with the next weights, those of one
    learner's step later, which are waited for if they are not there yet: up to `rl.staleness`,
    with which the last tokens of a step are drawn by the weights that learn from them. 0 draws
    each step's rollouts under one set of weights."""
    in_flight_calls: Annotated[int, at_least(1)] = 8
    """Calls of the engine after which they do, and again after as many; `episode/visits` tells how
    many a step takes."""
    routing_replay: bool = False
    """Send each token in the learner to the experts that served it when it was read or drawn
    (Rollout Routing Replay, arXiv 2510.11370): only the choice is replayed, its weights are those
    of the learner's routers. So does the reference; a teacher, which reads another prompt, chooses
    (docs/adr/0042). A rollout then takes a byte per token, layer and expert in memory of each host:
    3.8 MB for 10,000 tokens through 48 layers with 8 experts each."""
    filter_groups: Literal["total", "accuracy"] | None = None
    """Learn only from groups whose rollouts differ in this reward, `total` or `accuracy`, and draw
    others in their place (DAPO's dynamic sampling, arXiv 2503.14476); None learns from all."""
    filter_redraws: Annotated[int, at_least(1)] = 3
    """Further batches of prompts that may be drawn to fill one. If that is not enough, groups
    without spread fill the rest."""
    subagent_credit: Literal["none", "full", "share"] = "none"
    """Whether sub-agents train too: `none` of them does, each gets the `full` advantage of its
    episode, or a `share` of it, divided by the sub-agents of the episode. Their tokens count in the
    mean like all others; with aggregation by sequence each of them is a row."""
    mask_over_turn: bool = False
    """Learn nothing from a rollout that still calls a tool in its last turn, where it had to
    answer (Video-o3, arXiv 2601.23224), and do not count it in `filter_groups`. Its reward stays in
    the mean of its group."""
    overlong_limit: Annotated[int | None, at_least(1)] = None
    """Generated tokens of a rollout from which on its reward falls by all of `overlong_weight`
    (DAPO's soft over-long punishment); None punishes no length."""
    overlong_margin: Annotated[int | None, at_least(1)] = None
    """Tokens below the limit over which the punishment grows from nothing."""
    overlong_weight: Annotated[float, above(0)] = 1.0
    """Size of the punishment."""

    def check_together(self) -> None:
        """Refuse sizes that do not fit one another."""
        if self.prompts_per_step % (self.minibatches * self.micro_groups):
            raise Refused(
                self,
                "{prompts_per_step} is not a multiple of {minibatches} x {micro_groups}; choose "
                "divisors",
            )
        if self.in_flight_updates > self.staleness:
            raise Refused(
                self,
                "{in_flight_updates} with {staleness}: rollouts begin that many steps behind, and "
                "cannot take more updates than that; lower it, or raise {staleness:name}",
            )
        limit, margin = self.overlong_limit, self.overlong_margin
        if (limit is None) != (margin is None) or not (margin or 1) <= (limit or 1):
            raise Refused(
                self,
                "{overlong_limit} with {overlong_margin}: give a limit, and a margin of 1 to it",
            )

    @property
    def trains_subagents(self) -> bool:
        """Whether sub-agents are in the loss."""
        return self.subagent_credit != "none"

    @property
    def updates(self) -> int:
        """Optimiser steps of one batch of rollouts."""
        return self.epochs * self.minibatches


def staleness_note(rl: RlSettings, objective: ObjectiveConfig) -> str | None:
    """What a user should know about rollouts of older weights, learned from without a bound."""
    correction = objective.correction
    if not rl.staleness or correction.bypass:
        return None
    if correction.weights == "none":
        what = (
            "weights=none: rollouts of older weights are learned from as if they were of the newest"
        )
    elif rl.updates == 1 and objective.surrogate == "clip":
        # Ratios are all 1 in the first update; on the demo's model the format is lost so.
        what = "proximal=learner: the clip never acts in the one update of a batch"
    else:
        return None
    return (
        f"rl.staleness={rl.staleness} with objective.correction.{what}; set "
        "objective.correction.proximal=sampler, with which it bounds how far one pushes "
        "(docs/para_grpo.md)"
    )
