"""The rules and limits of an episode, and the tokens and KV-cache slots that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

from paravt_jax.interfaces import Renderer
from paravt_jax.marks import Mark
from paravt_jax.plugins import Own
from paravt_jax.protocol import GROUNDING_TOOL, SYNTAXES, THINK_OPEN, Syntax, call_syntax
from paravt_jax.ranges import above, at_least
from paravt_jax.settings import Refused, Settings
from paravt_jax.windows import STRATEGIES
from rollout.engine.engine import SlotPool
from rollout.engine.sampler import SamplingConfig

MAIN, CROP = "main", "crop"
"""Slot pools of main agents and of sub-agents. Each has slots of its own, so that main agents which
wait for crops cannot keep sub-agents from running."""
ToolName = Literal["crop_video", "get_video_clip_frame", "grounding"]
"""The tools of `rollout.tools`."""


@dataclasses.dataclass(frozen=True)
class AgentConfig(Settings):
    """Rules and limits of an episode."""

    tools: tuple[ToolName | Own | Callable[..., Any], ...] = ("crop_video",)
    """What the agent may call: `crop_video` (ParaVT, LongVT), `get_video_clip_frame` (VITAL),
    `grounding` (Video-o3), or functions of your own (`rollout.tools`), given as such or as
    `path/to/file.py:name`; kept by that name."""
    call_syntax: Syntax = "tool_call"
    """How it writes calls: `tool_call`, Qwen's tag around name and arguments; `grounding`,
    Video-o3's tag around the arguments of the tool `grounding`, its only one."""
    clip_tokens: Annotated[tuple[int, ...], at_least(1)] = ()
    """Most vision tokens of a clip of `grounding`, one number for each of its strategies coarse,
    medium and fine. Given exactly where that tool is offered."""
    max_tool_rounds: Annotated[int, at_least(0)] = 1
    """Rounds of tool calls; the turn after the last one is the forced answer. 0 forbids tools."""
    dispatch: Literal["parallel", "sequential"] = "parallel"
    """`parallel` runs the calls of a turn side by side, as in ParaVT; `sequential` runs the first
    call of a turn and answers the others with an error, as agents of one call per turn need it."""
    max_calls_per_turn: Annotated[int, at_least(1)] = 5
    """Calls of one turn that are run; each one beyond gets an error response."""
    evidence: Literal["text", "frames"] = "text"
    """What a crop gives the main agent: `text` is the report of a sub-agent, as in ParaVT;
    `frames` are the frames themselves, as in LongVT and in the evaluation of ParaVT."""
    think_prefix: Annotated[str, Mark.MAY_BE_EMPTY] = "<think>\n"
    """Text that we put at the head of every turn; part of the scored text. May be empty. Where the
    chat template opens turns with `<think>` itself, that is their head, and what follows a
    `<think>` here comes after it (`turn_head`)."""
    turn_tokens: Annotated[int, at_least(1)] = 192
    """Longest turn that may call tools, in generated tokens."""
    answer_tokens: Annotated[int, at_least(1)] = 96
    """Longest forced answer, in generated tokens."""
    response_tokens: Annotated[int, at_least(1)] = 64
    """Tokens for words of tool responses, per allowed call; the responses of a turn share it."""
    demand: Annotated[str, Mark.MAY_BE_EMPTY] = ""
    """What the user says after the responses of the last round, to have the answer; empty: nothing,
    the turn that follows just may not call."""
    episode_tokens: Annotated[int, at_least(0)] = 0
    """Most tokens after the prompt, tool responses included: a turn that may call tools begins
    only while it, its responses and the forced answer still fit. 0: the other limits decide."""
    tool_timeout: Annotated[float, above(0)] = 60.0
    """Seconds that a call may take before it is answered with an error."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How the main agent draws tokens."""
    subagent_tokens: Annotated[int, at_least(1)] = 64
    """Longest report of a sub-agent, in generated tokens."""
    subagent_thought_tokens: Annotated[int, at_least(1)] = 1024
    """Tokens for its thought besides, where the chat template opens `<think>`. A thought is no
    report: only what follows it is shown to the main agent."""
    subagent_sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How sub-agents draw tokens."""
    subagent_batch: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 128
    """Sub-agents that work at a time; others wait for a free place."""
    decode_threads: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 4
    """Threads that decode crops."""

    def check_together(self) -> None:
        """Refuse tools, syntax and quotas that do not go together."""
        syntax = call_syntax(self.call_syntax)
        if not self.tools or len(set(self.tools)) < len(self.tools):
            raise Refused(self, "{tools}: name at least one, and each once")
        if syntax.tool and self.tools != (syntax.tool,):
            raise Refused(
                self, "{call_syntax} can call {tool} alone; set {tools:=}{tool}", tool=syntax.tool
            )
        if (GROUNDING_TOOL in self.tools) != bool(self.clip_tokens):
            raise Refused(
                self,
                "{clip_tokens} with {tools}: the tool {tool} and its quotas of vision tokens go "
                "together",
                tool=GROUNDING_TOOL,
            )
        if self.clip_tokens and len(self.clip_tokens) != len(STRATEGIES):
            names = ", ".join(STRATEGIES)
            raise Refused(self, "{clip_tokens}: give one number for each of {names}", names=names)
        for name, other in SYNTAXES.items():
            if other is not syntax and {other.open, other.close} & set(self.sampling.stop):
                raise Refused(
                    self,
                    "{sampling.stop}: calls are not written with the tags of {name}; stop at "
                    "{close}",
                    name=name,
                    close=syntax.close,
                )

    @property
    def tool_names(self) -> tuple[str, ...]:
        """`tools` as config.json keeps them: names of ours, `file.py:name` of users' own."""
        return tuple(map(str, self.tools))

    @property
    def offers_tools(self) -> bool:
        """Whether prompts name the tools: not where calls are forbidden."""
        return self.max_tool_rounds > 0

    @property
    def rounds(self) -> int:
        """How often responses can be appended. Forbidden calls are answered too, once."""
        return max(self.max_tool_rounds, 1)

    @property
    def calls_run(self) -> int:
        """Most calls of one turn that are run."""
        return 1 if self.dispatch == "sequential" else self.max_calls_per_turn

    @property
    def generated_tokens(self) -> int:
        """Most tokens that one rollout can generate."""
        return self.rounds * self.turn_tokens + self.answer_tokens


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """The limits of an episode in tokens of a tokenizer."""

    prefix: int
    """Forced head of a turn."""
    response: int
    """From the end of a turn to its forced head, at most."""
    turn: int
    """A turn that may call tools, with its responses: from forced head to forced head, at most."""
    answer: int
    """The forced answer with its head."""
    suffix: int
    """Everything after the prompt, at most: decides the size of the cache."""


def turn_head(config: AgentConfig, renderer: Renderer) -> list[int]:
    """Tokens that a main agent's turn begins with, whoever asks for them: template or settings."""
    prefix = config.think_prefix
    if renderer.opening:
        prefix = prefix.lstrip().removeprefix(THINK_OPEN).lstrip("\n")
    return renderer.encode(renderer.opening + prefix)


def subagent_limit(config: AgentConfig, renderer: Renderer) -> int:
    """Most tokens that a sub-agent generates: its report, and its thought if it has to think."""
    thought = config.subagent_thought_tokens if renderer.opening else 0
    return config.subagent_tokens + thought


def subagent_budget(config: AgentConfig, renderer: Renderer) -> int:
    """Most tokens of a sub-agent's stream after its prompt."""
    return len(renderer.encode(renderer.opening)) + subagent_limit(config, renderer)


def demand_tokens(config: AgentConfig, renderer: Renderer) -> int:
    """Tokens by which the demand for an answer makes responses longer."""
    if not config.demand:
        return 0
    return len(renderer.tool_turn([""], config.demand)) - len(renderer.tool_turn([""]))


def token_budget(config: AgentConfig, renderer: Renderer, crop_tokens: int = 0) -> TokenBudget:
    """The tokens that episodes need.

    Args:
        crop_tokens: most tokens of the frames of one crop in a tool response; counts where
            frames are the evidence.

    Raises:
        ValueError: `episode_tokens` leaves no room for one round of calls and an answer.
    """
    prefix = len(turn_head(config, renderer))
    # One response for each allowed call, and one that all surplus calls can share.
    markup = renderer.tool_turn(["x"] * (config.calls_run + 1))
    shown = crop_tokens if config.evidence == "frames" else 0
    # And the template's end of turn, where the turn ended otherwise.
    response = 1 + len(markup) + config.calls_run * (config.response_tokens + shown)
    response += demand_tokens(config, renderer)
    turn, answer = prefix + config.turn_tokens + response, prefix + config.answer_tokens
    most, cap = config.rounds * turn + answer, config.episode_tokens
    if 0 < cap < turn + answer:
        raise ValueError(
            f"agent.episode_tokens={cap}: one turn with its responses ({turn}) and the forced "
            f"answer ({answer}) do not fit; raise it to {turn + answer} or more, or set it to 0"
        )
    return TokenBudget(prefix, response, turn, answer, min(cap, most) if cap else most)


def slot_pools(
    config: AgentConfig,
    renderer: Renderer,
    *,
    prompts: int,
    copies: int,
    prompt_tokens: int,
    crop_tokens: int,
) -> dict[str, SlotPool]:
    """The slot pools that an engine needs to run this agent. There is none of sub-agents without
    tools, or where a crop shows its frames.

    Args:
        prompts: prompts that are rolled out at a time; more wait for a free place.
        copies: rollouts of each prompt.
        prompt_tokens: the longest prompt of a main agent.
        crop_tokens: most tokens of a crop: of a sub-agent's prompt, or of its frames in a tool
            response where frames are the evidence.
    """
    budget = token_budget(config, renderer, crop_tokens)
    main = SlotPool(prompts, copies, prompt_tokens, budget.suffix)
    if config.evidence == "frames" or not config.offers_tools:
        return {MAIN: main}
    subagent_tokens = subagent_budget(config, renderer)
    return {MAIN: main, CROP: SlotPool(config.subagent_batch, 1, crop_tokens, subagent_tokens)}
