"""Protocols through which rooms meet that may not import one another.

`models` implements `Policy`; `pipelines` implements `FrameReader` and `Renderer`;
`rollout` consumes all three; `train` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from paravt_jax.records import Clip, Frames, KVCache, Prompt, Row, VideoRef, VisionFeatures

Params = Any
"""A pytree of weights: `{parameter name: array}`."""


@runtime_checkable
class Policy(Protocol):
    """A language model with a vision tower, as pure functions of its weights."""

    def encode(
        self,
        params: Params,
        patches: Float[Array, "b f p c"],
        grids: Int[Array, "b f 2"],
    ) -> VisionFeatures:
        """Run the vision tower over the frames of each prompt; `v = f * p / merge**2`."""
        ...

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
        cache: KVCache | None = None,
        lengths: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Final hidden states of a right-padded block of tokens, after the last norm.

        Without a cache, each token attends to itself and the tokens before it in its row.
        With one, the block is appended at `cache.lengths` and attends to the cached tokens
        too; the returned cache is longer by `lengths` (default: the whole block).
        """
        ...

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Float32 vocabulary logits of hidden states."""
        ...

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache."""
        ...


@runtime_checkable
class TrainablePolicy(Policy, Protocol):
    """A policy as the trainer sees it: with the routers of its experts, if it has any."""

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
        cache: KVCache | None = None,
        lengths: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None, Float[Array, "l b t e"] | None]:
        """As `hidden`, and the router's logits of each layer with experts; None if none has."""
        ...


@runtime_checkable
class FrameReader(Protocol):
    """Decodes frames of a video file."""

    def overview(self, video: VideoRef, count: int) -> Frames:
        """`count` frames spread over the whole video."""
        ...

    def clip(self, video: VideoRef, start: float, end: float) -> Frames:
        """Frames of the window [start, end] seconds, at the crop rate and cap of the config."""
        ...


@runtime_checkable
class Renderer(Protocol):
    """Turns frames and words into token streams; knows the tokenizer and its chat template."""

    eos_ids: tuple[int, ...]
    pad_id: int

    def main_prompt(self, row: Row, frames: Frames, tools: bool) -> Prompt:
        """System and user turn of the main agent, up to and including the assistant header."""
        ...

    def subagent_prompt(self, frames: Frames, start: float, end: float) -> Prompt:
        """What a sub-agent reads about one crop, up to and including the assistant header."""
        ...

    def tool_turn(self, responses: Sequence[str]) -> list[int]:
        """Tokens from the end of an assistant turn to the head of the next one: all tool
        responses of the turn, then the assistant header. Assumes that the assistant turn
        ended with its end-of-turn token."""
        ...

    def clip(self, frames: Frames, start: float, end: float) -> Clip:
        """Frames of a window, prepared to be shown in a tool response."""
        ...

    def frames_turn(self, responses: Sequence[str | Clip]) -> Prompt:
        """As `tool_turn`, with frames for responses; positions count from 0."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are written out."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens kept."""
        ...
