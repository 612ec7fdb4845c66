"""Protocols through which rooms meet that may not import one another.

`models` implements `Policy`; `pipelines` implements `FrameReader` and `Renderer`;
`rollout` consumes all three; `train` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from paravt_jax.kv_cache import KVCache
from paravt_jax.records import (
    Clip,
    Frames,
    HiddenKeys,
    Prompt,
    Row,
    VideoRef,
    VisionFeatures,
)
from paravt_jax.routing import RoutingShape
from paravt_jax.shared_rows import SharedRows

Params = Any
"""A pytree of weights: `{parameter name: array}`."""


class _Towers(Protocol):
    """What sampler and trainer both need of a language model with a vision tower: pure functions
    of its weights."""

    def encode(
        self,
        params: Params,
        patches: Float[Array, "b f p c"],
        grids: Int[Array, "b f 2"],
    ) -> VisionFeatures:
        """Run the vision tower over the frames of each prompt; `v = f * p / merge**2`."""
        ...


@runtime_checkable
class Policy(_Towers, Protocol):
    """A policy as the sampler sees it: prompts and what continues them, through a KV cache."""

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        ...

    def prepare(self, params: Params) -> Params:
        """Weights in the form that the other methods read fastest, for as long as they stay the
        same. Every method takes either form."""
        ...

    def shardings(self, params: Mapping[str, Any], mesh: Mesh) -> Any:
        """Where each of these weights, or shapes of weights, which `prepare` returned, lives on a
        mesh."""
        ...

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b k t h"], Float[Array, "l b k t h"]]:
        """Final hidden states of right-padded prompts, after the last norm, and the keys and
        values of all layers. Each token attends to itself and the tokens before it."""
        ...

    def append(
        self,
        params: Params,
        tokens: Int[Array, "m t"],
        positions: Int[Array, "m t 3"],
        vision_index: Int[Array, "m t"],
        features: VisionFeatures | None,
        caches: tuple[KVCache, ...],
        rows: Int[Array, " m"] | None = None,
    ) -> tuple[Float[Array, "m t d"], tuple[KVCache, ...]]:
        """Final hidden states of a block that continues running rows, and the caches with the
        block written after what each row has: one token of each row to decode, or several at
        once, such as a tool response.

        The block holds the rows of all caches, one cache after the other, or the given `rows` of
        the only cache. Lengths stay as they are: the caller knows how much of the block counts.
        """
        ...

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Float32 vocabulary logits of hidden states."""
        ...

    def init_cache(
        self, prompts: int, copies: int, prompt_slots: int, suffix_slots: int
    ) -> KVCache:
        """An empty cache of `prompts * copies` rows: slots for `prompt_slots` tokens of each prompt
        and `suffix_slots` tokens of each row after its prompt."""
        ...


Prefilled = tuple[Float[Array, "b t d"], Float[Array, "l b k t h"], Float[Array, "l b k t h"]]
"""Hidden states, keys and values; see `Policy.prefill`."""
Appended = tuple[Float[Array, "m t d"], tuple[KVCache, ...]]
"""Hidden states and grown caches; see `Policy.append`."""


class RoutedPolicy(Policy, Protocol):
    """A policy that also tells the sampler which experts served each token (`RoutingShape`)."""

    @property
    def routing(self) -> RoutingShape | None:
        """Shape of a record of its routing; None for a dense model, which has none."""
        ...

    def prefill_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
    ) -> tuple[Prefilled, Int[Array, "b t choices"]]:
        """As `prefill`, and the experts of each token."""
        ...

    def append_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "m t"],
        positions: Int[Array, "m t 3"],
        vision_index: Int[Array, "m t"],
        features: VisionFeatures | None,
        caches: tuple[KVCache, ...],
        rows: Int[Array, " m"] | None = None,
    ) -> tuple[Appended, Int[Array, "m t choices"]]:
        """As `append`, and the experts of each token."""
        ...


def routing_of(policy: Policy | TrainablePolicy) -> RoutingShape | None:
    """Shape of a record of a policy's routing; None if it has none, or tells of none."""
    return getattr(policy, "routing", None)


@runtime_checkable
class TrainablePolicy(_Towers, Protocol):
    """A policy as the trainer sees it: whole streams at once, and the routers of its experts."""

    @property
    def experts_per_token(self) -> int:
        """Experts that serve each token; 0 for a dense model."""
        ...

    def hidden_and_router(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
        segments: Int[Array, "b t"] | None = None,
        hidden_keys: HiddenKeys | None = None,
        shared: SharedRows | None = None,
        routing: Int[Array, "b t choices"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b t e"] | None]:
        """Final hidden states of right-padded rows, and the router's logits of each layer with
        experts; None if none has. With `segments`, a token sees only those of its own; with
        `hidden_keys`, none that are hidden from it; with `shared`, a row is a prompt and
        the streams that continue it, and goes with neither. With `routing` (`RoutingShape`), the
        experts that it knows serve a token in place of the router's choice, weighed by the router.
        """
        ...

    def head(self, params: Params) -> Callable[[Float[Array, "*b d"]], Float[Array, "*b vocab"]]:
        """What maps hidden states to float32 vocabulary logits, a few at a time within one program:
        on a mesh its weights are laid out once, split over the vocabulary, and so are the logits.
        """
        ...


@runtime_checkable
class FrameReader(Protocol):
    """Decodes frames of a video file."""

    def overview(self, video: VideoRef, count: int) -> Frames:
        """`count` frames at even distances over the whole video."""
        ...

    def clip(self, video: VideoRef, start: float, end: float, tokens: int | None = None) -> Frames:
        """Frames of the window [start, end] seconds, at the crop rate and cap of the config.
        With `tokens`, so few and so small that they come to that many vision tokens at most."""
        ...

    def frames_at(self, video: VideoRef, times: Sequence[float]) -> Frames:
        """The frames on screen at these seconds, in the resolution of the file."""
        ...


@runtime_checkable
class Renderer(Protocol):
    """Turns frames and words into token streams; knows the tokenizer and its chat template."""

    eos_ids: tuple[int, ...]
    """Tokens that end a turn; the first is the one that the chat template writes."""
    pad_id: int
    opening: str
    """What the chat template itself puts at the head of the assistant's turns: `<think>` and a line
    break in Thinking models, else nothing. It is left out of prompts and of tool turns, which end
    with the header; whoever asks for a turn gives it first, as part of the turn."""

    def main_prompt(self, row: Row, frames: Frames | Sequence[Frames], tools: bool) -> Prompt:
        """System and user turn of the main agent, up to and including the assistant header; with
        frames of each of the row's videos."""
        ...

    def subagent_prompt(self, frames: Frames, start: float, end: float) -> Prompt:
        """What a sub-agent reads about one crop, up to and including the assistant header."""
        ...

    def tool_turn(self, responses: Sequence[str], demand: str = "") -> list[int]:
        """Tokens from the end of an assistant turn to the head of the next one: all tool
        responses of the turn, then the assistant header. Assumes that the assistant turn
        ended with its end-of-turn token."""
        ...

    def resized(self, frames: Frames) -> Frames:
        """Frames of any size at the size that the model sees."""
        ...

    def clip(self, frames: Frames, start: float, end: float) -> Clip:
        """Frames of a window, prepared to be shown in a tool response."""
        ...

    def frames_turn(self, responses: Sequence[str | Clip], demand: str = "") -> Prompt:
        """As `tool_turn`, with frames for responses; positions count from 0."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are written out."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens kept."""
        ...
