"""The words of the project as typed, frozen records.

Host-side records hold numpy arrays. Device-side records (`VisionFeatures`,
`HiddenKeys`, `LearnerBatch`) are pytrees of jax arrays.

Axis legend, used in every shape of the project:
    b rows of a batch     t tokens              d model width
    rows: of tokens, each a whole stream, or a prompt and the streams that continue it
    own: tokens of a stream after its prompt
    n query heads         k key/value heads     h head width
    f frames              p patches of a frame  c values of a flattened patch
    v vision tokens       s, u cache slots      l layers
    g rollouts of a group e experts, or levels of DeepStack
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.lazy_array import LazyArray
from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.routing import Routing
from paravt_jax.shared_rows import Bounds, SharedRows


class StopReason(enum.StrEnum):
    """Why a generated turn ended."""

    END = "end"
    """The model emitted an end-of-turn token."""
    STOP = "stop"
    """The model wrote what its request wanted to stop at; there is no end-of-turn token."""
    LENGTH = "length"
    """The turn used up its token budget."""


class QuestionType(enum.StrEnum):
    """How an answer is judged; the values are those of ParaVT-Parquet's `question_type`."""

    OPEN = "oe"
    CHOICE = "mcq"
    GROUNDING = "tvg"


@dataclasses.dataclass(frozen=True)
class VideoRef:
    """A video file that a row owns. Tools read this file and no other."""

    path: str
    """Absolute path on this machine."""
    duration: float
    """Length in seconds."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One question about one video, or about several that are shown together."""

    row_id: str
    """Unique within its data set; seeds of this row are derived from it."""
    video: VideoRef
    """The video that tools open."""
    question: str
    """The text put to the agent, options included."""
    answer: str
    """Ground truth: words, an option letter, or `start, end` in seconds."""
    question_type: str = QuestionType.OPEN
    evidence: tuple[tuple[float, float], ...] = ()
    """Windows `(start, end)` in seconds where the answer can be seen; empty if nobody marked them.
    Rewards that judge where a tool looked compare with these."""
    more_videos: tuple[VideoRef, ...] = ()
    """Further videos that the prompt shows after `video`; tools do not open them."""

    @property
    def videos(self) -> tuple[VideoRef, ...]:
        """All videos, in the order in which the prompt shows them."""
        return (self.video, *self.more_videos)


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """An image file that a row owns."""

    path: str
    """Absolute path on this machine."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation, as a chat template takes it."""

    role: str
    """system, user, assistant or tool."""
    content: tuple[str | ImageRef | VideoRef, ...]
    """Words, images and videos in the order in which they are shown."""
    calls: tuple[ToolCall, ...] = ()
    """Calls of the assistant that the chat template writes after its words."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One supervised row: messages, those of the assistant to be learned."""

    row_id: str
    """Unique within its data set."""
    messages: tuple[Message, ...]

    @property
    def videos(self) -> tuple[VideoRef, ...]:
        """The videos of all messages, in the order in which they are shown."""
        parts = (part for message in self.messages for part in message.content)
        return tuple(part for part in parts if isinstance(part, VideoRef))


@dataclasses.dataclass(frozen=True)
class Frames:
    """Decoded frames of one video or one crop."""

    pixels: np.ndarray
    """uint8 `[f, height, width, 3]`, RGB."""
    times: np.ndarray
    """float64 `[f]`, seconds from the beginning of the whole video, also for a crop."""


Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of grey levels from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Patches:
    """Frames as the vision tower takes them; every frame padded to the same number of patches."""

    values: np.ndarray | LazyArray
    """`[f, p, c]` in merge-block order, channels outermost in `c`: uint8 grey levels with a
    `scale`, or float32 that is normalised already; zeros beyond a frame's own patches. Lazy where
    another host has them."""
    grids: np.ndarray
    """int32 `[f, 2]`: rows and columns of patches of each frame (0, 0 for a padding frame)."""
    scale: Scale | None = None
    """By which `values` are normalised when they are put into a batch (`paravt_jax.patches`)."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of one window of a video, ready to be shown in a tool response."""

    start: float
    """Start of the window in seconds."""
    end: float
    """End of the window in seconds."""
    times: np.ndarray
    """float64 `[f]`, seconds from the beginning of the whole video."""
    patches: Patches


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered prompt: what the model reads before its first generated token."""

    tokens: np.ndarray
    """int32 `[t]`."""
    positions: np.ndarray
    """int32 `[t, 3]`: temporal, height and width position of each token (M-RoPE)."""
    vision_index: np.ndarray
    """int32 `[t]`: which vision token stands here (frame-major, counted over the padded
    `f * p / merge**2` tokens of `patches`), or -1 for text."""
    patches: Patches | None = None
    times: tuple[np.ndarray, ...] = ()
    """Of each video, float64 seconds of the decoded frames that `patches` show, where the prompt
    was rendered with them: what it takes to render it once more with other words."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One supervised example: a prompt and the tokens to learn after it."""

    prompt: Prompt
    tokens: np.ndarray
    """int32 `[t]`: everything after the prompt, tool responses included."""
    weights: np.ndarray
    """float32 `[t]`: loss weight of predicting each token; 0 where it is only context."""
    shown: tuple[Shown, ...] = ()
    """Frames that tool responses put into this stream, in stream order."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Streams to learn from that share one row of a batch; one stream is a pack of one."""

    stream: Prompt
    """All tokens and frames, stream after stream; positions begin anew with each."""
    weights: np.ndarray
    """float32 `[t]`: loss weight of predicting each token; 0 where it is only context."""
    segments: np.ndarray
    """int32 `[t]`: which stream a token belongs to, counted from 1."""
    drawn: int = 0
    """Of a shuffled data set: how many of its items were drawn up to the last one of this row."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call as parsed from a turn. A call that could not be parsed carries `error`."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None
    """What is wrong with the call, in words for the model; None for a well-formed call."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """How tokens were chosen, where more than temperature shapes the draw."""

    chosen: np.ndarray
    """bool `[t]`: False where a grammar changed the token or left no other: the policy did not
    choose it, so nothing is learned there."""
    floors: np.ndarray
    """float32 `[t]`: log-probability below which truncation cut tokens off; minus infinity where
    it cut none."""
    grammar: np.ndarray
    """int32 `[t]`: state of the engine's grammar before the token; 0 allows all."""

    @classmethod
    def free(cls, count: int) -> Choices:
        """Of tokens that nothing shaped."""
        floors = np.full(count, -np.inf, np.float32)
        return cls(np.ones(count, bool), floors, np.zeros(count, np.int32))

    @classmethod
    def joined(cls, parts: Sequence[Choices]) -> Choices:
        """Those of several pieces of a stream, one after the other."""
        columns = zip(*((part.chosen, part.floors, part.grammar) for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What came of one call of a turn."""

    text: str
    """What the model was told; empty where it was shown frames."""
    executed: bool
    """Whether the call ran to a result."""
    window: tuple[float, float] | None = None
    """Start and end in seconds of what was looked at."""
    seconds: float = 0.0
    """From when the call went out until its result was there."""
    subagent: int | None = None
    """Which of `Trajectory.subagents` looked; None where none did."""
    clip: Clip | None = None
    """The frames that the model was shown instead of words."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One assistant turn: a forced prefix, then generated tokens."""

    prefix: np.ndarray
    """int32 `[t0]`: tokens that we put at the head of the turn (`<think>` when forced). Part of
    the scored text, not generated."""
    tokens: np.ndarray
    """int32 `[t1]`: the generated tokens, the end-of-turn token included if there was one."""
    log_probs: np.ndarray
    """float32 `[t1]`: log-probability of each generated token under the distribution that it was
    drawn from: tempered, penalised, truncated and constrained."""
    stop_reason: StopReason
    text: str = ""
    """Prefix and generated tokens as text, special tokens kept: what is scored."""
    calls: tuple[ToolCall, ...] = ()
    """Tool calls of this turn, in order, malformed ones included."""
    results: tuple[CallResult, ...] = ()
    """What came of each of `calls`; empty for the last turn, whose calls nobody runs."""
    choices: Choices | None = None
    """How each of `tokens` was chosen; None if nothing but temperature shaped them."""
    versions: np.ndarray | None = None
    """int32 `[t1]`: the version of the weights that drew each of `tokens`; None if one version drew
    the whole rollout."""

    @property
    def executed_calls(self) -> tuple[ToolCall, ...]:
        """The calls that ran to a result: noted when they did, not read from the text, for a model
        can write that a call has succeeded."""
        pairs = zip(self.calls, self.results, strict=False)
        return tuple(call for call, result in pairs if result.executed)


@dataclasses.dataclass(frozen=True)
class Shown:
    """Tool responses with frames, as they stand in a token stream."""

    at: int
    """Where `block` begins in `Trajectory.tokens`."""
    block: Prompt
    """The same tokens, with their frames; positions count from 0."""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout: the token stream exactly as the sampler saw it, and what came of it."""

    prompt: Prompt
    tokens: np.ndarray
    """int32 `[t]`: everything after the prompt: prefixes, generated tokens, tool responses."""
    generated: np.ndarray
    """bool `[t]`: True where the token was generated. Those that the policy chose itself are
    trained, see `chosen`."""
    log_probs: np.ndarray
    """float32 `[t]`: sampler's log-probability where `generated`, 0 elsewhere."""
    turns: tuple[Turn, ...]
    scored_text: str
    """Assistant text of all turns, forced prefixes included, tool responses excluded."""
    full_text: str
    """Everything after the prompt as text, for people."""
    subagents: tuple["Trajectory", ...] = ()
    """Sub-agent rollouts, in call order."""
    shown: tuple[Shown, ...] = ()
    """Frames that tool responses put into this stream itself, in stream order."""
    call_syntax: str = "tool_call"
    """How its calls are written, a name of `paravt_jax.protocol.SYNTAXES`."""
    policy_version: int = 0
    """Step (batch of prompts, counted from 0) whose weights sampled this, or its first token."""
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    """Reward by term; `total` is the one that trains."""
    choices: Choices | None = None
    """How each of `tokens` was chosen; None if nothing but temperature shaped them."""
    versions: np.ndarray | None = None
    """int32 `[t]`: the version of the weights that drew each token where `generated`, -1 elsewhere;
    None if `policy_version` drew all."""
    routing: Routing | None = None
    """Which experts served its tokens; None if the sampler did not note it."""

    @property
    def drawn_by(self) -> np.ndarray:
        """int32: the version of the weights that drew each generated token, in their order."""
        if self.versions is not None:
            return self.versions[self.generated]
        return np.full(int(self.generated.sum()), self.policy_version, np.int32)

    @property
    def chosen(self) -> np.ndarray:
        """bool `[t]`: True where the policy chose the token, and no grammar did."""
        return self.generated if self.choices is None else self.generated & self.choices.chosen

    @property
    def turn_numbers(self) -> np.ndarray:
        """int `[t]`: which turn a token belongs to, counted from 1, be it generated or of the
        forced head; 0 where the assistant does not speak."""
        begins = np.diff(self.generated, prepend=False) & self.generated
        numbers = np.cumsum(begins) * self.generated
        for start, turn in zip(np.flatnonzero(begins), self.turns, strict=False):
            numbers[start - len(turn.prefix) : start] = numbers[start]
        return numbers

    @property
    def calls(self) -> int:
        """Tool calls made, malformed ones included."""
        return sum(len(turn.calls) for turn in self.turns)

    @property
    def executed(self) -> int:
        """Tool calls that ran to a result."""
        return sum(len(turn.executed_calls) for turn in self.turns)

    @property
    def over_turn(self) -> bool:
        """Whether even the last turn calls: the rollout used up its rounds, or its room, and
        then did not answer when it had to."""
        return bool(self.turns and self.turns[-1].calls)


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """One prompt and its rollouts, which share row, frames and frame budget."""

    row: Row
    frame_budget: int
    """K: how many overview frames the prompt shows."""
    trajectories: tuple[Trajectory, ...]


@pytree
@dataclasses.dataclass(frozen=True)
class VisionFeatures:
    """Output of the vision tower for a batch of prompts."""

    tokens: Float[Array, "b v d"]
    deepstack: Float[Array, "b e v d"]
    """One addend per DeepStack layer (`e` of them), for the first `e` language layers."""


@pytree
@dataclasses.dataclass(frozen=True)
class HiddenKeys:
    """Tokens that some of the later ones may not see: key j is hidden from query i if
    `blind[i] & kinds[j]`."""

    blind: Int[ArrayLike, "b t"]
    """Bits of the kinds that a token may not see."""
    kinds: Int[ArrayLike, "b t"]
    """Bits of the kinds that a token is of."""

    def visible(
        self, queries: int, keys: int, first: int | Int[Array, ""] = 0
    ) -> Bool[Array, "b q s"]:
        """Which of the first `keys` tokens are not hidden from `queries` tokens, from number
        `first` on."""
        blind = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.blind), first, queries, axis=1)
        return blind[:, :, None] & jnp.asarray(self.kinds)[:, None, :keys] == 0


@pytree
@dataclasses.dataclass(frozen=True)
class LearnerBatch:
    """Token streams as the learner takes them: `b` streams in `b / g` groups of `g` neighbours.

    Where streams share prompts, a row of tokens is a prompt and the streams that continue it
    (`SharedRows`), and what concerns one stream is about its own tokens, `[b, own]`: what comes
    after the prompt. Else a row is one whole stream, or several packed ones, and `rows` is `b` and
    `own` is `t`. `shared` tells which.

    Rows and streams are right-padded. Vision comes once per group, either as patches (the tower
    runs in the loss) or as features (it ran before, its weights do not train).
    """

    tokens: Int[ArrayLike, "rows t"]
    positions: Int[ArrayLike, "rows t 3"]
    vision_index: Int[ArrayLike, "rows t"]
    lengths: Int[ArrayLike, "b"]
    """Tokens of each stream after its prompt, or of each row where streams are whole."""
    loss_weights: Float[ArrayLike, "b own"]
    """Weight of predicting the token at this index from those before it; 0 where not trained."""
    behaviour_log_probs: Float[ArrayLike, "b own"]
    """Log-probability of the token at this index in the distribution that the sampler drew it from
    (0 where not generated)."""
    reference_log_probs: Float[ArrayLike, "b own"]
    """Frozen initial policy's log-probability of the token (0 where not generated, or where nothing
    uses it)."""
    advantages: Float[ArrayLike, "b own"]
    structural: Bool[ArrayLike, "b own"]
    """Where a generated token belongs to a structural tag."""
    patches: Float[ArrayLike, "groups f p c"] | None
    grids: Int[ArrayLike, "groups f 2"] | None
    features: VisionFeatures | None
    proximal_log_probs: Float[ArrayLike, "b own"] | None = None
    """Log-probability of the token when the learner first saw the batch. None where it learns from
    it once: then that is the current policy's own."""
    segments: Int[ArrayLike, "rows t"] | None = None
    """Which of several packed streams a token belongs to, counted from 1, and 0 for padding: no
    token sees another stream's. None where each row is one stream."""
    hidden_keys: HiddenKeys | None = None
    """What some tokens may not see although it stands before them; None: they see it all."""
    prompt_lengths: Int[ArrayLike, " rows"] | None = None
    """Tokens of each row's prompt; None for rows that are whole streams without a repetition
    penalty."""
    floors: Float[ArrayLike, "b own"] | None = None
    """See `Choices.floors`; None without truncation."""
    grammar: Int[ArrayLike, "b own"] | None = None
    """See `Choices.grammar`; None without a grammar."""
    routing: Int[ArrayLike, "rows t choices"] | None = None
    """Experts that serve each token, see `RoutingShape`; None leaves all to the routers."""
    starts: Int[ArrayLike, "b"] | None = None
    """Where streams begin in the rows of their prompts; None where they are whole."""
    bounds: Bounds | None = None
    """Of such rows."""
    subagents: LearnerBatch | None = None
    """Rows of sub-agents that train with these, equally many for each group; None: they do not."""

    @property
    def streams_per_row(self) -> int:
        """Streams that stand in a row: 1 where they are whole."""
        return self.loss_weights.shape[0] // self.tokens.shape[0]

    @property
    def shared(self) -> SharedRows | None:
        """Where prompts and streams stand; None where rows are whole streams."""
        if self.starts is None or self.bounds is None:
            return None
        return SharedRows(self.prompt_lengths, self.starts, self.lengths, self.bounds)

    @property
    def own_tokens(self) -> Int[ArrayLike, "b own"]:
        """The tokens that `loss_weights` and all that is shaped like them are about."""
        shared = self.shared
        return self.tokens if shared is None else shared.streams(self.tokens)

    @property
    def trained(self) -> Float[Array, "b own"]:
        """`loss_weights` of what can be predicted: a stream's very first token cannot."""
        weights = jnp.asarray(self.loss_weights)
        return weights.at[:, 0].set(0.0) if self.shared is None else weights
