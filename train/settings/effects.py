"""Which settings act only where another one has a certain value.

A setting that is given and does not act is refused, even if its value is the default. Given is, on
a command line, what flags and `--set` name; in a recipe, what `based_on` names; and in a
configuration that is put together by hand, whatever differs from the defaults. What a recipe
inherits, or a command line finds in its recipe, is not given, and may have lost its effect. Only
what switches something on (`off` is known) must act whoever set it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paravt_jax.plugins import Own
from paravt_jax.rewards.rules import READ_BY_ALL, RewardRules, readers_of
from paravt_jax.settings import Refused, any_of, as_text
from train.settings.override import leaves

if TYPE_CHECKING:
    from train.config import Config

IF_GIVEN = object()


@dataclasses.dataclass(frozen=True)
class Only:
    """Settings that act only where another one has a certain value."""

    settings: str
    """Their names; with a dot at the end, all of a section."""
    when: str
    """What decides: the name of a setting, or of a property of the configuration."""
    values: tuple[Any, ...] | Callable[[Any], bool] = bool
    """Its values with which they act, or what tells so; by default all but none, 0, false and
    nothing."""
    off: Any = IF_GIVEN
    """The value that switches the settings off, or what tells so. With any other they must act,
    given or not."""
    reason: str = ""
    """What follows "has no effect" in a refusal; empty says what `when` and `values` say."""

    def acts(self, config: Config) -> bool:
        """Whether they act."""
        value = operator.attrgetter(self.when)(config)
        return value in self.values if isinstance(self.values, tuple) else self.values(value)

    def is_on(self, value: Any) -> bool:
        """Whether a value of a switch switches something on."""
        return not self.off(value) if callable(self.off) else value != self.off

    def concerns(self, name: str) -> bool:
        """Whether it is about this setting."""
        sections = tuple(each for each in self.settings.split() if each.endswith("."))
        return name != self.when and (name in self.settings.split() or name.startswith(sections))

    @property
    def condition(self) -> str:
        """What decides and how, in short; empty where settings alone do not tell."""
        if not isinstance(self.values, tuple):
            return self.when if self.values is bool else ""
        return f"{self.when}={any_of(map(as_text, self.values))}"

    def refusal(self, config: Config, name: str) -> Refused:
        """The setting has no effect."""
        sentence, when = f"{{{name}}} has no effect", self.when
        if self.reason:
            return Refused(config, f"{sentence} {self.reason}")
        if not isinstance(self.values, tuple):
            remedy = f"leave it out, or set {{{when}:name}} too"
            return Refused(config, f"{sentence} with {{{when}}}; {remedy}")
        others = any_of(map(as_text, self.values))
        other = f"{{{when}:={others}}}" if len(self.values) == 1 else f"{{{when}:name}} to {others}"
        return Refused(config, f"{sentence} with {{{when}}}; leave it out, or set {other}")


class Read(Only):
    """A setting of rewards, which acts where the scheme says that it reads it."""

    def acts(self, config: Config) -> bool:
        """Whether it acts."""
        return self.settings.removeprefix("rewards.") in config.rewards.definition.reads


def _clip_or_own(surrogate: str) -> bool:
    """What a function of the user's own does with a ratio of 1 is not known."""
    return surrogate == "clip" or isinstance(surrogate, Own)


ONE_UPDATE = (
    "while a batch gets one optimiser step, because its ratio is always 1; leave it out, or set "
    "{rl.epochs:name} or {rl.minibatches:name}, or {objective.correction.proximal:=sampler}"
)
NO_ROLLOUTS = "with {stage}, which has no rollouts; leave it out"
PACKED = "on packed conversations"

TABLE = (
    # The settings, what decides, its values with which they act, what switches them off, and what
    # a refusal says.
    Only("data.reader", "data.path", off=None, reason="without --data; leave it out"),
    Only("data.video_marks", "data.frames_as", ("video",), off=None),
    Only("data.fetched_gb", "data.remote", reason="without data on gs:// or s3://; leave it out"),
    Only("data.weights", "data.mixture", off=()),
    Only("data.mixture data.workers data.decode_threads data.steps_ahead", "stage", ("rl",),
         IF_GIVEN,
         "with {stage}, which reads one data set by threads; leave it out"),
    Only("model.remat_keeps model.remat_block", "model.remat"),
    Only("model.gradient_dtype", "model.compute_dtype", ("bfloat16",)),
    Only("model.attention", "model.compute_dtype", ("bfloat16",), "auto"),
    Only("model.train_vision", "stage", ("sft",), False,
         "with {stage}, where vision features are computed once per prompt; set it to false"),
    Only("model.train_vision", "model.lora.rank", (0,), False,
         "with {model.lora.rank}, which trains adapters alone; set it to false"),
    Only("model.frozen optimizer.groups optimizer.rates", "model.lora.rank", (0,), (),
         "with {model.lora.rank}, which trains adapters alone; leave it out"),
    Only("model.lora.alpha model.lora.targets", "model.lora.rank"),
    Only("model.adapter", "model.lora.rank", bool, None,
         "without {model.lora.rank:name}; set it, {model.lora.alpha:name} and "
         "{model.lora.targets:name} to those of its adapter_config.json"),
    Only("model.router_balance", "packs_conversations", operator.not_, 0.0,
         f"{PACKED}: it balances the experts of one stream, and a row holds several; set it to 0"),
    Only("optimizer.decay_steps", "optimizer.decay", ("cosine",), off=None),
    Only("optimizer.final_fraction", "optimizer.decay", ("cosine",)),
    Only("rewards.judge.", "rewards.mode", ("llm",)),
    Only("advantages.leave_one_out", "advantages.normalise", ("group", "batch"), off=False),
    Only("advantages.kl_estimator", "advantages.kl_weight"),
    Only("objective.clip_low objective.clip_high objective.dual_clip", "objective.surrogate",
         ("clip",)),
    Only("objective.clip_low objective.clip_high objective.dual_clip", "ratio_moves",
         operator.truth, reason=ONE_UPDATE),
    Only("objective.surrogate", "ratio_moves", operator.truth, _clip_or_own, ONE_UPDATE),
    Only("objective.soft_positive objective.soft_negative", "objective.surrogate", ("soft",)),
    Only("objective.regression_eps objective.regression_detached", "objective.surrogate",
         ("regression",)),
    Only("objective.constant_length", "objective.aggregation", ("constant",), off=None),
    Only("objective.behaviour_cap objective.correction.beyond objective.correction.floor",
         "objective.correction.weights", ("token", "product", "geometric")),
    Only("objective.behaviour_cap objective.correction.beyond objective.correction.floor "
         "objective.correction.weights", "objective.correction.proximal", ("learner",)),
    Only("objective.correction.reject_floor objective.correction.reject_cap",
         "objective.correction.reject", off=None),
    Only("objective.anchor_paired_only", "objective.anchor", ("position", "logprob"), off=False),
    Only("rl.reference_every", "uses_reference", operator.not_, IF_GIVEN,
         "where {objective.kl_weight:name} or {advantages.kl_weight:name} takes the reference at "
         "every step; leave it out"),
    Only("rl.filter_redraws", "rl.filter_groups"),
    Only("rl.in_flight_calls", "rl.in_flight_updates"),
    Only("rl.overlong_weight", "rl.overlong_limit"),
    Only("rl.subagent_credit", "agent.evidence", ("text",), "none",
         "with {agent.evidence}, where no sub-agent speaks; set it to none"),
    Only("rl.subagent_credit", "agent.max_tool_rounds", bool, "none",
         "with {agent.max_tool_rounds}, where no sub-agent speaks; set it to none"),
    Only("rl. objective. advantages.", "stage", ("rl",), reason=NO_ROLLOUTS),
    Only("sft.", "stage", ("sft",),
         reason="with {stage}, which learns from rollouts; leave it out"),
    Only("agent.subagent_tokens agent.subagent_thought_tokens agent.subagent_batch "
         "agent.subagent_sampling.", "agent.evidence", ("text",)),
    Only("rollout_devices", "rl.staleness", off=0),
    Only("teacher.strength", "stage", ("rl",), 0.0, NO_ROLLOUTS),
    Only("difficulty.window", "stage", ("rl",), 0, NO_ROLLOUTS),
    Only("teacher.", "teacher.strength"),
    Only("teacher.judge.", "teacher.judge.url"),
    Only("teacher.support", "teacher.full_weight", lambda weight: weight < 1, IF_GIVEN,
         "with {teacher.full_weight}, which compares on the whole vocabulary; leave one of them "
         "out"),
    Only("difficulty.", "difficulty.window"),
    Only("sft.packing.", "sft.phases", ((),), IF_GIVEN,
         "on the tasks of {sft.phases:name}, whose rows hold one example each; leave it out, or "
         "take --recipe paravt_sft"),
    Only("sft.task_masks", "sft.phases", bool, 0.0,
         "on conversations: it masks tasks of the needle world; set it to 0"),
    Only("sft.task_masks", "agent.call_syntax", ("grounding",), off=0.0),
    Only("sft.mask_predictor", "sft.task_masks"),
    Only("evaluation.rows", "packs_conversations", operator.not_, 0,
         f"{PACKED}, which hold no questions to evaluate; set it to 0"),
    Only("evaluation.every", "evaluation.rows", off=0),
    Only("evaluation.best", "evaluation.every"),
    Only("output.keep_best", "evaluation.every", off=0),
    Only("output.details_mb", "stage", ("rl",), reason=NO_ROLLOUTS),
    Only("output.details_mb", "output.rollouts"),
    Only("output.compile_cache_gb", "output.compile_cache"),
)  # fmt: skip
"""All of them, but for the settings of rewards, of which each scheme says which it reads."""


def check_effects(config: Config) -> None:
    """Refuse settings that do not act."""
    values = dict(leaves(config))
    names = tuple(values)
    given = changed(config) if config.given is None else config.given
    for only in (*TABLE, *of_rewards()):
        if only.acts(config):
            continue
        for name in _concerned(only, names):
            value = values[name]
            if value is not None and (name in given if only.off is IF_GIVEN else only.is_on(value)):
                raise only.refusal(config, name)


@functools.cache
def _concerned(only: Only, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(only.concerns, names))


def changed(config: Config) -> tuple[str, ...]:
    """Settings that differ from the defaults of their sections."""
    defaults = dict(leaves(type(config)))
    return tuple(n for n, value in leaves(config) if n in defaults and value != defaults[n])


@functools.cache
def of_rewards() -> tuple[Only, ...]:
    """Rows of the table for the settings of rewards, of which each scheme says which it reads."""
    names = [field.name for field in dataclasses.fields(RewardRules)]
    readers = {name: readers_of(name) for name in names if name not in READ_BY_ALL}
    return tuple(Read(f"rewards.{name}", "rewards.scheme", readers[name]) for name in readers)
