"""Settings of one RL step: how many rollouts, which of them are kept, how often they teach."""

from __future__ import annotations

import dataclasses

from paravt_jax.objectives import ObjectiveConfig
from rollout.limits import AgentConfig


@dataclasses.dataclass(frozen=True)
class RlSettings:
    """Size of one RL step, and what becomes of its rollouts."""

    prompts_per_step: int = 7
    """Prompts of one batch of rollouts."""
    group_size: int = 8
    """Rollouts per prompt (G)."""
    micro_groups: int = 1
    """Groups per gradient micro-batch."""
    epochs: int = 1
    """Times that a batch of rollouts is learned from."""
    minibatches: int = 1
    """Optimiser steps of one epoch, each on a share of the prompts; always the same shares."""
    warm_up: bool = False
    """Compile what steps can need before the first one, not when it first occurs: a run that never
    stops for it, for a later start."""
    filter_groups: str | None = None
    """Learn only from groups whose rollouts differ in this reward, `total` or `accuracy`, and draw
    others in their place (DAPO's dynamic sampling, arXiv 2503.14476); None learns from all."""
    filter_redraws: int = 3
    """Further batches of prompts that may be drawn to fill one. If that is not enough, groups
    without spread fill the rest."""
    subagent_credit: str = "none"
    """Whether sub-agents train too: `none` of them does, each gets the `full` advantage of its
    episode, or a `share` of it, divided by the sub-agents of the episode. Their tokens count in the
    mean like all others; with aggregation by sequence each of them is a row."""
    mask_over_turn: bool = False
    """Learn nothing from a rollout that still calls a tool in its last turn, where it had to
    answer (Video-o3, arXiv 2601.23224), and do not count it in `filter_groups`. Its reward stays in
    the mean of its group."""
    overlong_limit: int | None = None
    """Generated tokens of a rollout from which on its reward falls by all of `overlong_weight`
    (DAPO's soft over-long punishment); None punishes no length."""
    overlong_margin: int | None = None
    """Tokens below the limit over which the punishment grows from nothing."""
    overlong_weight: float = 1.0
    """Size of the punishment."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that has no meaning, or no effect beside the others."""
        for name in ("prompts_per_step", "micro_groups", "epochs", "minibatches", "filter_redraws"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(
                f"rl.group_size={self.group_size} gives every rollout a zero advantage; "
                "set it to 2 or more"
            )
        if self.prompts_per_step % (self.minibatches * self.micro_groups):
            raise ValueError(
                f"rl.prompts_per_step={self.prompts_per_step} is not a multiple of rl.minibatches="
                f"{self.minibatches} x rl.micro_groups={self.micro_groups}; choose divisors"
            )
        if self.subagent_credit not in ("none", "full", "share"):
            raise ValueError(
                f"rl.subagent_credit={self.subagent_credit}: choose none, full or share"
            )
        self._check_filter()
        self._check_overlong()

    @property
    def trains_subagents(self) -> bool:
        """Whether sub-agents are in the loss."""
        return self.subagent_credit != "none"

    @property
    def updates(self) -> int:
        """Optimiser steps of one batch of rollouts."""
        return self.epochs * self.minibatches

    def _check_filter(self) -> None:
        if self.filter_groups not in (None, "total", "accuracy"):
            raise ValueError(
                f"rl.filter_groups={self.filter_groups}: choose total, accuracy or none"
            )
        if self.filter_groups is None and self.filter_redraws != RlSettings.filter_redraws:
            raise ValueError(
                f"rl.filter_redraws={self.filter_redraws} has no effect while all groups are "
                "kept; set rl.filter_groups"
            )

    def _check_overlong(self) -> None:
        limit, margin, weight = self.overlong_limit, self.overlong_margin, self.overlong_weight
        if limit is None and margin is None:
            if weight != RlSettings.overlong_weight:
                raise ValueError(
                    f"rl.overlong_weight={weight} has no effect without rl.overlong_limit; set it"
                )
        elif limit is None or margin is None or not 0 < margin <= limit or weight <= 0:
            raise ValueError(
                f"rl.overlong_limit={limit}, rl.overlong_margin={margin}, rl.overlong_weight="
                f"{weight}: give a limit, a margin of 1 to the limit, and a weight above 0"
            )


def check_updates(rl: RlSettings, objective: ObjectiveConfig) -> None:
    """Refuse settings of the ratio where it is always 1: one optimiser step per batch.

    Raises:
      ValueError: naming the setting.
    """
    for name in ("clip_low", "clip_high", "dual_clip", "surrogate"):
        value = getattr(objective, name)
        if name == "surrogate" and objective.own_surrogate:
            continue  # it may do more than clip
        if rl.updates == 1 and value != getattr(ObjectiveConfig, name):
            raise ValueError(
                f"objective.{name}={value} has no effect while a batch gets one optimiser step, "
                "because its ratio is always 1; leave it out, or set rl.epochs or rl.minibatches"
            )


def check_subagents(rl: RlSettings, agent: AgentConfig, objective: ObjectiveConfig) -> None:
    """Refuse to train sub-agents where there are none, or none that the objective could judge.

    Raises:
      ValueError: naming the settings.
    """
    if not rl.trains_subagents:
        return
    credit = f"rl.subagent_credit={rl.subagent_credit}"
    if agent.evidence == "frames" or not agent.max_tool_rounds:
        raise ValueError(
            f"{credit} has no effect with agent.evidence={agent.evidence} and agent."
            f"max_tool_rounds={agent.max_tool_rounds}: no sub-agent speaks; set it to none"
        )
    if agent.subagent_sampling.temperature <= 0:
        raise ValueError(
            f"{credit} with agent.subagent_sampling.temperature=0: reports that are not sampled "
            "cannot be judged by their probability; set it above 0"
        )
    if objective.surrogate == "regression":
        raise ValueError(
            f"{credit} with objective.surrogate=regression, which compares the rollouts of one "
            "prompt; sub-agents have prompts of their own: set it to none"
        )


def check_choice(rl: RlSettings, agent: AgentConfig) -> None:
    """Refuse to sample what is to be learned from a distribution that holds one token, or one of
    which the policy's own choices are no fair sample (`docs/adr/0020`).

    Raises:
      ValueError: naming the setting.
    """
    learned = {"agent.sampling": agent.sampling}
    if rl.trains_subagents:
        learned["agent.subagent_sampling"] = agent.subagent_sampling
    for name, own in learned.items():
        if own.top_k == 1:
            raise ValueError(
                f"{name}.top_k=1 leaves one token to draw, so that there is no choice to learn "
                "from; set it to 0, which keeps every token, or to 2 or more"
            )
        if own.min_p == 1:
            raise ValueError(
                f"{name}.min_p=1 leaves only the likeliest token to draw, so that there is no "
                "choice to learn from; set it below 1, or to 0, which keeps every token"
            )
        if own.constrain and own.truncates:
            raise ValueError(
                f"{name}.constrain={own.constrain} with {name}.top_k={own.top_k}, top_p="
                f"{own.top_p} and min_p={own.min_p}: what truncation leaves of the allowed tokens "
                "is not what it leaves of all, so the tokens that the policy chose itself are no "
                "fair sample to learn from; set top_k=0, top_p=1 and min_p=0, or no grammar"
            )


def check_lengths(rl: RlSettings, longest: int) -> None:
    """Refuse lengths that no rollout of at most `longest` generated tokens reaches.

    Raises:
      ValueError: naming the setting.
    """
    limit, margin = rl.overlong_limit, rl.overlong_margin
    if limit is not None and margin is not None and limit - margin >= longest:
        raise ValueError(
            f"rl.overlong_limit={limit} with rl.overlong_margin={margin} has no effect: a rollout "
            f"generates at most {longest} tokens; lower the limit"
        )
