"""Small stand-ins for the seams of `rollout`: a policy, a renderer, a reader, an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paravt_jax.blocks import text_block
from paravt_jax.interfaces import Renderer
from paravt_jax.patches import join_patches
from paravt_jax.records import (
    Clip,
    Frames,
    KVCache,
    Patches,
    Prompt,
    Row,
    StopReason,
    VideoRef,
    VisionFeatures,
)
from rollout.engine import Engine, Lane
from rollout.session import Generated, Stream

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image|>")
VOCAB = 128 + len(SPECIAL)
IM_END, PAD, IMAGE = 129, 130, 131
MERGE = 4
"""Patches per vision token of the toy tower."""


class ToyRenderer:
    """ASCII characters are tokens; special tokens come after them."""

    eos_ids = (IM_END, PAD)
    pad_id = PAD

    def main_prompt(self, row: Row, frames: Frames, tools: bool) -> Prompt:
        return text_prompt(f"<|im_start|>user\n{row.question}<|im_end|>\n<|im_start|>assistant\n")

    def subagent_prompt(self, frames: Frames, start: float, end: float) -> Prompt:
        return text_prompt(f"<|im_start|>SUB {start:g} {end:g}<|im_end|>\n<|im_start|>assistant\n")

    def tool_turn(self, responses: Sequence[str]) -> list[int]:
        body = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in responses)
        return self.encode(f"\n<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n")

    def clip(self, frames: Frames, start: float, end: float) -> Clip:
        count = len(frames.times)
        values = np.full((count, MERGE, 3), start, np.float32)
        return Clip(start, end, frames.times, Patches(values, np.full((count, 2), 2, np.int32)))

    def frames_turn(self, responses: Sequence[str | Clip]) -> Prompt:
        """A frame is one token between its words and the next."""
        clips = [response for response in responses if isinstance(response, Clip)]
        words = [r if isinstance(r, str) else "<|image|>" * len(r.times) for r in responses]
        block = text_block(self.tool_turn(words))
        seen = block.tokens == IMAGE
        index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
        patches = join_patches([clip.patches for clip in clips])
        return dataclasses.replace(block, vision_index=index, patches=patches)

    def encode(self, text: str) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        ids = [
            [128 + SPECIAL.index(part)] if part in SPECIAL else [ord(c) % 128 for c in part]
            for part in parts
        ]
        return [token for part in ids for token in part]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(t) if t < 128 else SPECIAL[t - 128] for t in map(int, tokens))


def text_prompt(text: str) -> Prompt:
    """A prompt without frames."""
    return text_block(ToyRenderer().encode(text))


def image_prompt(text: str, frames: int, patches: int, seed: int, values: int = 3) -> Prompt:
    """A prompt of `frames` random frames of `patches` patches of `values` numbers, then text."""
    words = text_prompt(text)
    count = frames * patches // MERGE
    pixels = np.random.default_rng(seed).normal(size=(frames, patches, values))
    grids = np.tile(np.array([[2, patches // 2]], np.int32), (frames, 1))
    # Frames take fewer positions than tokens, as in M-RoPE: text goes on after the largest.
    seen = np.repeat(np.arange(frames, dtype=np.int32), patches // MERGE)
    return Prompt(
        tokens=np.concatenate([np.full(count, IMAGE, np.int32), words.tokens]),
        positions=np.concatenate([np.repeat(seen[:, None], 3, axis=1), words.positions + frames]),
        vision_index=np.concatenate([np.arange(count, dtype=np.int32), words.vision_index]),
        patches=Patches(pixels.astype(np.float32), grids),
    )


class ToyPolicy:
    """One attention layer with positions, vision tokens and a real cache."""

    def __init__(self, width: int = 16, sharpness: float = 3.0) -> None:
        self.width, self.sharpness = width, sharpness

    def init(self, seed: int = 0) -> dict[str, jax.Array]:
        shapes = {"embed": (VOCAB, self.width), "see": (3, self.width), "head": (self.width, VOCAB)}
        shapes |= {name: (self.width, self.width) for name in ("q", "k", "v")}
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return {
            name: jax.random.normal(key, shape) * shape[0] ** -0.5
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def encode(self, params, patches, grids) -> VisionFeatures:
        b, f, p, c = patches.shape
        tokens = patches.reshape(b, f * p // MERGE, MERGE, c).mean(2) @ params["see"]
        return VisionFeatures(tokens=tokens, deepstack=jnp.zeros((b, 0, *tokens.shape[1:])))

    def init_cache(self, batch: int, slots: int) -> KVCache:
        empty = jnp.zeros((1, batch, slots, 1, self.width))
        return KVCache(keys=empty, values=empty, lengths=jnp.zeros(batch, jnp.int32))

    def hidden(
        self, params, tokens, positions, vision_index, features=None, cache=None, lengths=None
    ):
        b, t = tokens.shape
        x = params["embed"][tokens]
        if features is not None:
            seen = jnp.take_along_axis(
                features.tokens, jnp.maximum(vision_index, 0)[..., None], axis=1
            )
            x = jnp.where(vision_index[..., None] >= 0, seen, x)
        x = x + jnp.sin(
            positions.sum(-1)[..., None] / 3.0 * 0.5 ** jnp.arange(self.width, dtype=jnp.float32)
        )
        live = cache if cache is not None else self.init_cache(b, t)
        at = live.lengths[:, None] + jnp.arange(t)
        rows = jnp.arange(b)[:, None]
        keys = live.keys[0, :, :, 0].at[rows, at].set(x @ params["k"], mode="drop")
        values = live.values[0, :, :, 0].at[rows, at].set(x @ params["v"], mode="drop")
        scores = jnp.einsum("btd,bsd->bts", x @ params["q"], keys) * self.width**-0.5
        causal = jnp.arange(keys.shape[1]) <= at[..., None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        hidden = x + jnp.einsum("bts,bsd->btd", weights, values)
        if cache is None:
            return hidden, None
        more = jnp.full(b, t) if lengths is None else lengths
        grown = KVCache(
            keys=keys[None, :, :, None],
            values=values[None, :, :, None],
            lengths=live.lengths + more,
        )
        return hidden, grown

    def logits(self, params, hidden):
        return (self.sharpness * hidden @ params["head"]).astype(jnp.float32)


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
        row.given = given
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
        ended = tokens[-1] in self.engine.renderer.eos_ids
        log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        reason = StopReason.END if ended else StopReason.LENGTH
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


class SentinelReader:
    """Remembers every file and window that was asked for; some windows cannot be decoded."""

    def __init__(self, broken_from: float = 1e9) -> None:
        self.opened: list[str] = []
        self.clips: list[tuple[float, float]] = []
        self.broken_from = broken_from

    def overview(self, video: VideoRef, count: int) -> Frames:
        return self._frames(video)

    def clip(self, video: VideoRef, start: float, end: float) -> Frames:
        if start >= self.broken_from:
            raise OSError(f"cannot decode {video.path}")
        self.clips.append((start, end))
        return self._frames(video)

    def _frames(self, video: VideoRef) -> Frames:
        self.opened.append(video.path)
        return Frames(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1))
