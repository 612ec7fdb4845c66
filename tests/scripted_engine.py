"""An engine that says what a script tells it: slots, queues, room and visits as in the real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paravt_jax.interfaces import Renderer
from paravt_jax.records import Prompt, StopReason
from rollout.engine.engine import Engine, Lane
from rollout.engine.session import Generated, Stream
from tests.rollout_fakes import ToyRenderer


class ScriptedEngine(Engine):
    """An engine whose streams say what a script tells them; its sessions keep all they saw."""

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        turns_B: Sequence[Sequence[str]],
        report: Callable[[str], str] | None = None,
        visit: int = 16,
        renderer: Renderer | None = None,
    ) -> None:
        """`turns_B`: texts of each main stream, turn by turn; without `<|im_end|>` = cut off.
        `report`: what a sub-agent says to its prompt."""
        self.lanes, self.turns_B, self.tokens_per_visit = lanes, turns_B, visit
        self.renderer = renderer or ToyRenderer()
        self.visits = 0
        self.report = report or (lambda prompt: "seen.<|im_end|>")
        self.sessions: list[ScriptedSession] = []

    def session(self, params) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self))
        return self.sessions[-1]


@dataclasses.dataclass
class ScriptedStream:
    """One row of a scripted session."""

    lane: str
    prompt: Prompt
    seed: int
    script: list[str]
    group: int
    tokens: list[int]
    limits: list[int] = dataclasses.field(default_factory=list)
    blocks: list[Prompt] = dataclasses.field(default_factory=list)
    """What was given with positions, frames and all."""
    given: Sequence[int] | Prompt | None = None
    """Told to speak, nothing appended yet."""
    stop: tuple[str, ...] = ()
    """Texts that end its turn."""
    saying: list[int] = dataclasses.field(default_factory=list)
    said: int = 0
    closed: bool = False

    @property
    def speaking(self) -> bool:
        return self.given is not None or bool(self.saying)


class ScriptedSession:
    """Slots, queues, room and visits as in the engine; words from a script."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.rows: list[ScriptedStream] = []
        self.live: dict[str, list[int]] = {lane: [] for lane in engine.lanes}
        """Groups that hold a prompt slot, by lane."""
        self.queued: dict[str, list[int]] = {lane: [] for lane in engine.lanes}
        self.most_live = {lane: 0 for lane in engine.lanes}
        self.log: list[str] = []
        self.groups = 0

    def of(self, lane: str) -> list[ScriptedStream]:
        """Streams of a lane in the order in which they were opened."""
        return [row for row in self.rows if row.lane == lane]

    def open(self, lane: str, prompt: Prompt, seeds: Sequence[int]) -> list[Stream]:
        shape = self.engine.lanes[lane]
        if not 1 <= len(seeds) <= shape.copies or len(prompt.tokens) > shape.prompt_tokens:
            raise ValueError(f"{len(prompt.tokens)} tokens x {len(seeds)} never fit {shape}")
        self.queued[lane].append(self.groups)
        streams = [self._open(lane, prompt, seed) for seed in seeds]
        self.log.append(f"open {lane}")
        self.groups += 1
        return streams

    def _open(self, lane: str, prompt: Prompt, seed: int) -> Stream:
        if lane == "crop":
            script = [self.engine.report(self.engine.renderer.decode(prompt.tokens))]
        else:
            script = list(self.engine.turns_B[len(self.of(lane))])
        row = ScriptedStream(lane, prompt, seed, script, self.groups, prompt.tokens.tolist())
        self.rows.append(row)
        return Stream(len(self.rows) - 1)

    def room(self, stream: Stream) -> int:
        row = self.rows[stream.number]
        return self.engine.lanes[row.lane].suffix - (len(row.tokens) - len(row.prompt.tokens))

    def speak(self, stream, given, sampling, limit) -> None:
        row, count = self.rows[stream.number], _length(given)
        if row.closed or row.speaking or count + limit > self.room(stream):
            raise ValueError(f"stream {stream} cannot take {count} + {limit} tokens")
        row.given, row.stop = given, sampling.stop
        row.limits.append(limit)

    def close(self, stream: Stream) -> None:
        row = self.rows[stream.number]
        assert not row.speaking and not row.closed
        row.closed = True
        if all(other.closed for other in self.rows if other.group == row.group):
            self.live[row.lane].remove(row.group)

    @property
    def speaking(self) -> int:
        return sum(row.speaking for row in self.rows)

    def visit(self) -> list[tuple[Stream, Generated]]:
        assert self.speaking, "the device has nothing to do"
        self.log.append("visit")
        self.engine.visits += 1
        for lane, shape in self.engine.lanes.items():
            while self.queued[lane] and len(self.live[lane]) < shape.prompts:
                self.live[lane].append(self.queued[lane].pop(0))
            self.most_live[lane] = max(self.most_live[lane], len(self.live[lane]))
        turns = [self._decode(number) for number in range(len(self.rows))]
        return [turn for turn in turns if turn is not None]

    def _decode(self, number: int) -> tuple[Stream, Generated] | None:
        row = self.rows[number]
        if row.group not in self.live[row.lane] or not row.speaking:
            return None
        if row.given is not None:
            self._append(row)
        step = self.engine.tokens_per_visit
        row.tokens += row.saying[row.said : row.said + step]
        row.said += step
        if row.said < len(row.saying):
            return None
        tokens, row.saying = row.saying, []
        log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        renderer, reason = self.engine.renderer, StopReason.LENGTH
        if tokens[-1] in renderer.eos_ids:
            reason = StopReason.END
        elif row.stop and renderer.decode(tokens).endswith(row.stop):
            reason = StopReason.STOP
        return Stream(number), Generated(np.asarray(tokens, np.int32), log_probs, reason)

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
