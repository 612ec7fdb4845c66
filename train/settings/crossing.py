"""Settings of several sections that do not fit one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paravt_jax.parts import SEEN
from paravt_jax.settings import Refused, placed
from rollout.engine.sampler import SamplingConfig
from rollout.tools import agent_tools

if TYPE_CHECKING:
    from train.config import Config


def check_crossing(config: Config) -> None:
    """Refuse settings that exclude one another, or that together leave nothing to do."""
    data, rewards = config.data, config.rewards
    if data.video_root and not (data.path or data.mixture):
        raise Refused(config, "{data.video_root} has no effect without --data; leave it out")
    if rewards.mode == "llm":
        with placed("rewards.judge."):
            rewards.judge.check()
    agent_tools(config.agent)  # refuses names that no tool has
    syntax = rewards.definition.call_syntax
    if syntax not in (None, config.agent.call_syntax):
        raise Refused(
            config,
            "{rewards.scheme} judges calls in {agent.call_syntax:=}{syntax}, and the agent writes "
            "{agent.call_syntax}; set one of them to fit",
            syntax=syntax,
        )
    _check_parts(config)
    (_check_rl if config.stage == "rl" else _check_sft)(config)


def _check_parts(config: Config) -> None:
    """Parts that do not train anyway are neither frozen nor given a rate."""
    model, groups = config.model, config.optimizer.groups
    if not model.train_vision and {*model.frozen, *groups} & {*SEEN}:
        setting = "{optimizer.groups}" if {*groups} & {*SEEN} else "{model.frozen}"
        raise Refused(
            config,
            f"{setting} names {' or '.join(SEEN)}, which do not train with {{model.train_vision}}; "
            "leave them out",
        )
    if {*groups} & {*model.frozen}:
        raise Refused(
            config, "{optimizer.groups} with {model.frozen}: what is frozen has no learning rate"
        )


def _check_sft(config: Config) -> None:
    sft, data = config.sft, config.data
    if not sft.phases and data.path is None and "--data" not in config.needs:
        raise ValueError("the sft stage needs sft.phases; take them from a recipe")
    if sft.phases and data.path:
        raise Refused(
            config,
            "{data.path}: {recipe_name} learns tasks of the needle world and reads no "
            "conversations; take --recipe paravt_sft, or leave --data out",
            recipe_name=config.recipe,
        )


def _check_rl(config: Config) -> None:
    _check_anchor(config)
    _check_subagents(config)
    _check_draws(config, "agent.sampling", config.agent.sampling)
    if config.rl.trains_subagents:
        _check_draws(config, "agent.subagent_sampling", config.agent.subagent_sampling)
    limit, margin = config.rl.overlong_limit, config.rl.overlong_margin
    if limit and margin and limit - margin >= config.agent.generated_tokens:
        raise Refused(
            config,
            "{rl.overlong_limit} with {rl.overlong_margin} has no effect: a rollout generates at "
            "most {longest} tokens; lower the limit",
            longest=config.agent.generated_tokens,
        )
    _check_methods(config)


def _check_anchor(config: Config) -> None:
    """The readings of the anchor exclude one another, and each has a weight of its own."""
    objective, rewards = config.objective, config.rewards
    if objective.anchor == "position" and not rewards.anchor_share:
        raise Refused(
            config,
            "{objective.anchor} has no effect with {rewards.anchor_weight}, "
            "{rewards.format_weight} and {rewards.scheme}: it needs both weights, and a scheme "
            "with an anchor such as paravt; set {objective.anchor:=sequence}",
        )
    instead = objective.anchor == "logprob" or objective.own_anchor
    if instead != bool(objective.anchor_weight):
        raise Refused(
            config,
            "{objective.anchor} with {objective.anchor_weight}: {objective.anchor:=logprob} or one "
            "of your own, and a weight above 0, go together",
        )
    if instead and rewards.anchor_share:
        raise Refused(
            config,
            "{objective.anchor} takes the place of the anchor in the reward; set "
            "{rewards.anchor_weight} to 0",
        )


def _check_subagents(config: Config) -> None:
    """Sub-agents that train must be sampled, and judged by a loss that takes each by itself."""
    if not config.rl.trains_subagents:
        return
    if config.agent.subagent_sampling.temperature <= 0:
        raise Refused(
            config,
            "{rl.subagent_credit} with {agent.subagent_sampling.temperature}: reports that are not "
            "sampled cannot be judged by their probability; set it above 0",
        )
    if config.objective.surrogate == "regression":
        raise Refused(
            config,
            "{rl.subagent_credit} with {objective.surrogate}, which compares the rollouts of one "
            "prompt; sub-agents have prompts of their own: set it to none",
        )


def _check_draws(config: Config, name: str, sampling: SamplingConfig) -> None:
    """What is learned is not sampled from a distribution that holds one token, or one of which the
    policy's own choices are no fair sample (`docs/adr/0020`)."""
    if sampling.temperature <= 0:
        raise Refused(
            config,
            f"{{{name}.temperature}} samples the same rollout again and again; RL needs it above 0",
        )
    if sampling.top_k == 1 or sampling.min_p == 1:
        setting = "top_k" if sampling.top_k == 1 else "min_p"
        raise Refused(
            config,
            f"{{{name}.{setting}}} leaves only the likeliest token to draw, so that there is no "
            f"choice to learn from; set {{{name}.{setting}:=0}}, which keeps every token",
        )
    if sampling.constrain and sampling.truncates:
        raise Refused(
            config,
            f"{{{name}.constrain}} with {{{name}.top_k}}, {{{name}.top_p}} and {{{name}.min_p}}: "
            "what truncation leaves of the allowed tokens is not what it leaves of all, so the "
            "tokens that the policy chose itself are no fair sample to learn from; set top_k=0, "
            "top_p=1 and min_p=0, or no grammar",
        )


def _check_methods(config: Config) -> None:
    difficulty = config.difficulty
    if difficulty.window and difficulty.traces > config.rl.group_size:
        raise Refused(
            config,
            "{difficulty.traces} is above {rl.group_size}, the rollouts of a prompt that there is "
            "room for; lower it",
        )
    if difficulty.window and config.teacher.strength:
        raise Refused(
            config,
            "{difficulty.window} with {teacher.strength}: a teacher reads the plain question with "
            "its own hint, not prompts that were hinted already; set one of them to 0",
        )
