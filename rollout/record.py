"""The record of a stream, built while the stream grows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from paravt_jax.interfaces import Renderer
from paravt_jax.records import Choices, Prompt, Shown, Trajectory, Turn
from paravt_jax.routing import Routing
from rollout.engine.slots import Generated


def derive_seed(*parts: object) -> int:
    """A uint32 that depends on all parts and on nothing else (no salted `hash`)."""
    # A separator that row ids do not hold, or ("a", "bc") and ("ab", "c") would share a seed.
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


class TrajectoryBuilder:
    """Everything that is appended to one stream, in order."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.turns: list[Turn] = []
        self.shown: list[Shown] = []
        self.subagents: list[Trajectory] = []
        self.routing: list[Routing] = []
        """Of each turn and what was given before it; empty if nobody noted it."""
        self._parts: list[tuple[np.ndarray, bool, np.ndarray, Choices]] = []

    def __len__(self) -> int:
        """Tokens after the prompt."""
        return sum(len(tokens) for tokens, *_ in self._parts)

    def add_given(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens that the policy did not generate."""
        given = np.asarray(tokens, np.int32)
        nothing = np.zeros(len(given), np.float32)
        self._parts.append((given, False, nothing, Choices.free(len(given))))

    def add_frames(self, block: Prompt) -> None:
        """Append tool responses with frames."""
        self.shown.append(Shown(len(self), block))
        self.add_given(block.tokens)

    def add_routing(self, routing: Routing | None) -> None:
        """Which experts served what was given since the last turn, and what was generated then."""
        self.routing += [] if routing is None else [routing]

    def add_turn(self, turn: Turn) -> None:
        """Append a generated turn (its prefix was given before)."""
        self.turns.append(turn)
        choices = turn.choices or Choices.free(len(turn.tokens))
        self._parts.append((turn.tokens, True, turn.log_probs, choices))

    def finish(self, renderer: Renderer, policy_version: int) -> Trajectory:
        """The record of the whole stream. `policy_version` drew it, where turns do not say."""
        parts, generated, log_probs, choices = zip(*self._parts, strict=True)
        tokens = np.concatenate(parts)
        generated = np.repeat(generated, [len(part) for part in parts])
        versions = _versions(self.turns, generated)
        return Trajectory(
            prompt=self.prompt,
            tokens=tokens,
            generated=generated,
            log_probs=np.concatenate(log_probs),
            turns=tuple(self.turns),
            scored_text="".join(turn.text for turn in self.turns),
            full_text=renderer.decode(tokens.tolist()),
            subagents=tuple(self.subagents),
            shown=tuple(self.shown),
            policy_version=policy_version if versions is None else int(versions[generated][0]),
            choices=Choices.joined(choices),
            versions=versions,
            routing=Routing.joined(self.routing) if self.routing else None,
        )


def _versions(turns: Sequence[Turn], generated: np.ndarray) -> np.ndarray | None:
    """Those of turns, where they stand in the stream, see `Trajectory.versions`."""
    drawn_by = [turn.versions for turn in turns if turn.versions is not None]
    if not drawn_by:
        return None
    versions = np.full(len(generated), -1, np.int32)
    versions[generated] = np.concatenate(drawn_by)
    return versions


def generated_turn(generated: Generated, prefix: Sequence[int], renderer: Renderer) -> Turn:
    """A generated turn after its forced prefix; its calls are not parsed yet."""
    return Turn(
        prefix=np.asarray(prefix, np.int32),
        tokens=generated.tokens,
        log_probs=generated.log_probs,
        stop_reason=generated.stop_reason,
        choices=generated.choices,
        versions=generated.versions,
        text=renderer.decode([*prefix, *generated.tokens.tolist()]),
    )
