"""An engine that says what a script tells it: slots, queues, room and steps as in the real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paravt_jax.interfaces import Renderer
from paravt_jax.records import Prompt, StopReason
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.slots import Generated, StreamId
from tests.support.rollout_fakes import ToyRenderer


class ScriptedEngine(Engine):
    """An engine whose streams say what a script tells them; its sessions keep all they saw."""

    def __init__(
        self,
        pools: Mapping[str, SlotPool],
        turns_B: Sequence[Sequence[str]],
        report: Callable[[str], str] | None = None,
        tokens_per_step: int = 16,
        renderer: Renderer | None = None,
    ) -> None:
        """`turns_B`: texts of each main stream, turn by turn; without `<|im_end|>` = cut off.
        `report`: what a sub-agent says to its prompt."""
        self.pools, self.turns_B, self.tokens_per_step = pools, turns_B, tokens_per_step
        self.renderer = renderer or ToyRenderer()
        self.steps = 0
        self.report = report or (lambda prompt: "seen.<|im_end|>")
        self.sessions: list[ScriptedSession] = []

    def session(self, params) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self))
        return self.sessions[-1]


@dataclasses.dataclass
class ScriptedStream:
    """One row of a scripted session."""

    pool: str
    prompt: Prompt
    seed: int
    script: list[str]
    group: int
    tokens: list[int]
    limits: list[int] = dataclasses.field(default_factory=list)
    blocks: list[Prompt] = dataclasses.field(default_factory=list)
    """What was given with positions, frames and all."""
    given: Sequence[int] | Prompt | None = None
    """What the next turn begins with; not appended yet."""
    stop: tuple[str, ...] = ()
    """Texts that end its turn."""
    saying: list[int] = dataclasses.field(default_factory=list)
    said: int = 0
    closed: bool = False

    @property
    def generating(self) -> bool:
        return self.given is not None or bool(self.saying)


class ScriptedSession:
    """Slots, queues, room and steps as in the engine; words from a script."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.rows: list[ScriptedStream] = []
        self.live: dict[str, list[int]] = {pool: [] for pool in engine.pools}
        """Groups that hold a prompt slot, by pool."""
        self.queued: dict[str, list[int]] = {pool: [] for pool in engine.pools}
        self.most_live = {pool: 0 for pool in engine.pools}
        self.log: list[str] = []
        self.groups = 0

    def of(self, pool: str) -> list[ScriptedStream]:
        """Streams of a pool in the order in which they were opened."""
        return [row for row in self.rows if row.pool == pool]

    def open(self, pool: str, prompt: Prompt, seeds: Sequence[int]) -> list[StreamId]:
        shape = self.engine.pools[pool]
        if not 1 <= len(seeds) <= shape.copies or len(prompt.tokens) > shape.prompt_tokens:
            raise ValueError(f"{len(prompt.tokens)} tokens x {len(seeds)} never fit {shape}")
        self.queued[pool].append(self.groups)
        streams = [self._open(pool, prompt, seed) for seed in seeds]
        self.log.append(f"open {pool}")
        self.groups += 1
        return streams

    def _open(self, pool: str, prompt: Prompt, seed: int) -> StreamId:
        if pool == "crop":
            script = [self.engine.report(self.engine.renderer.decode(prompt.tokens))]
        else:
            script = list(self.engine.turns_B[len(self.of(pool))])
        row = ScriptedStream(pool, prompt, seed, script, self.groups, prompt.tokens.tolist())
        self.rows.append(row)
        return StreamId(len(self.rows) - 1)

    def tokens_left(self, stream: StreamId) -> int:
        row = self.rows[stream.number]
        return self.engine.pools[row.pool].suffix - (len(row.tokens) - len(row.prompt.tokens))

    def generate(self, stream, given, sampling, max_tokens) -> None:
        row, count = self.rows[stream.number], _length(given)
        if row.closed or row.generating or count + max_tokens > self.tokens_left(stream):
            raise ValueError(f"stream {stream} cannot take {count} + {max_tokens} tokens")
        row.given, row.stop = given, sampling.stop
        row.limits.append(max_tokens)

    def close(self, stream: StreamId) -> None:
        row = self.rows[stream.number]
        assert not row.generating and not row.closed
        row.closed = True
        if all(other.closed for other in self.rows if other.group == row.group):
            self.live[row.pool].remove(row.group)

    @property
    def generating(self) -> int:
        return sum(row.generating for row in self.rows)

    def step(self) -> list[tuple[StreamId, Generated]]:
        assert self.generating, "the device has nothing to do"
        self.log.append("step")
        self.engine.steps += 1
        for pool, shape in self.engine.pools.items():
            while self.queued[pool] and len(self.live[pool]) < shape.prompts:
                self.live[pool].append(self.queued[pool].pop(0))
            self.most_live[pool] = max(self.most_live[pool], len(self.live[pool]))
        turns = [self._decode(number) for number in range(len(self.rows))]
        return [turn for turn in turns if turn is not None]

    def _decode(self, number: int) -> tuple[StreamId, Generated] | None:
        row = self.rows[number]
        if row.group not in self.live[row.pool] or not row.generating:
            return None
        if row.given is not None:
            self._append(row)
        count = self.engine.tokens_per_step
        row.tokens += row.saying[row.said : row.said + count]
        row.said += count
        if row.said < len(row.saying):
            return None
        tokens, row.saying = row.saying, []
        log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        renderer, reason = self.engine.renderer, StopReason.LENGTH
        if tokens[-1] in renderer.eos_ids:
            reason = StopReason.END
        elif row.stop and renderer.decode(tokens).endswith(row.stop):
            reason = StopReason.STOP
        return StreamId(number), Generated(np.asarray(tokens, np.int32), log_probs, reason)

    def _append(self, row: ScriptedStream) -> None:
        """Take in what was given, and look up what the stream is going to say."""
        given, row.given = row.given, None
        if isinstance(given, Prompt):
            row.blocks.append(given)
        row.tokens += map(int, given.tokens if isinstance(given, Prompt) else given)
        row.saying = self.engine.renderer.encode(row.script.pop(0))[: row.limits[-1]]
        row.said = 0


def _length(given: Sequence[int] | Prompt) -> int:
    return len(given.tokens if isinstance(given, Prompt) else given)
