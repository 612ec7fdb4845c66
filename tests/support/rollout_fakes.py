"""Small stand-ins for the seams of `rollout`: a policy, a renderer, a reader, an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paravt_jax.blocks import text_block
from paravt_jax.kv_cache import CacheArray, KVCache, PageTable
from paravt_jax.patches import join_patches
from paravt_jax.records import (
    Clip,
    Frames,
    Patches,
    Prompt,
    Row,
    VideoRef,
    VisionFeatures,
)

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image|>")
VOCAB = 128 + len(SPECIAL)
IM_END, PAD, IMAGE = 129, 130, 131
MERGE = 4
"""Patches per vision token of the toy tower."""


class ToyRenderer:
    """ASCII characters are tokens; special tokens come after them."""

    eos_ids = (IM_END, PAD)
    pad_id = PAD
    opening = ""

    def main_prompt(self, row: Row, frames: Frames, tools: bool) -> Prompt:
        return text_prompt(f"<|im_start|>user\n{row.question}<|im_end|>\n<|im_start|>assistant\n")

    def subagent_prompt(self, frames: Frames, start: float, end: float) -> Prompt:
        return text_prompt(f"<|im_start|>SUB {start:g} {end:g}<|im_end|>\n<|im_start|>assistant\n")

    def tool_turn(self, responses: Sequence[str], demand: str = "") -> list[int]:
        body = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in responses)
        asked = f"<|im_start|>user\n{demand}<|im_end|>\n" if demand else ""
        head = f"\n<|im_start|>user\n{body}<|im_end|>\n{asked}"
        return self.encode(f"{head}<|im_start|>assistant\n")

    def resized(self, frames: Frames) -> Frames:
        return frames

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

    def prepare(self, params):
        return params

    def shardings(self, params, mesh):
        return dict.fromkeys(params, NamedSharding(mesh, PartitionSpec()))

    def encode(self, params, patches, grids) -> VisionFeatures:
        b, f, p, c = patches.shape
        tokens = patches.reshape(b, f * p // MERGE, MERGE, c).mean(2) @ params["see"]
        return VisionFeatures(tokens=tokens, deepstack=jnp.zeros((b, 0, *tokens.shape[1:])))

    def init_cache(self, prompts, copies, prompt_slots, suffix_slots) -> KVCache:
        rows = prompts * copies
        shared, own = (
            CacheArray.empty((1, count, 1, slots, self.width), jnp.float32)
            for count, slots in ((prompts, prompt_slots), (rows, suffix_slots))
        )
        lengths = (jnp.zeros(count, jnp.int32) for count in (prompts, rows))
        table = PageTable.whole(rows)
        return KVCache(shared, shared, next(lengths), own, own, next(lengths), table)

    def hidden(self, params, tokens, positions, vision_index, features=None):
        return self.prefill(params, tokens, positions, vision_index, features)[0]

    def prefill(self, params, tokens, positions, vision_index, features=None, visible=None):
        x = self._embed(params, tokens, positions, vision_index, features)
        keys, values = x @ params["k"], x @ params["v"]
        t = jnp.arange(tokens.shape[1])
        causal = jnp.broadcast_to(t[None] <= t[:, None], (len(tokens), len(t), len(t)))
        seen = causal if visible is None else visible
        hidden = x + self._attend(x @ params["q"], keys, values, seen)
        return hidden, keys[None, :, None], values[None, :, None]

    def append(self, params, tokens, positions, vision_index, features, caches, rows=None):
        x = self._embed(params, tokens, positions, vision_index, features)
        hidden, grown, start = [], [], 0
        for cache in caches:
            own = jnp.arange(cache.lengths.shape[0]) if rows is None else rows
            part = x[start : start + len(own)]
            start += len(own)
            mixed, cache = self._append_one(params, part, cache, own)
            hidden.append(part + mixed)
            grown.append(cache)
        return jnp.concatenate(hidden), tuple(grown)

    def _append_one(self, params, x, cache, rows):
        at = cache.lengths[rows][:, None] + jnp.arange(x.shape[1])[None]
        pages, slots = cache.places(rows, at)
        where = (pages, 0, slots)
        cache = dataclasses.replace(
            cache,
            keys=cache.keys.write(0, where, x @ params["k"]),
            values=cache.values.write(0, where, x @ params["v"]),
        )
        prompts = rows // cache.copies
        most, size = cache.table.pages.shape[2], cache.keys.count
        starts = jnp.broadcast_to(jnp.arange(most)[None] * size, (len(rows), most))
        pages = cache.places(rows, starts)[0]

        def suffix(own):
            return own.stacks[0][0, pages, 0].reshape(len(rows), most * size, self.width)

        keys, values = (
            jnp.concatenate([shared.stacks[0][0, prompts, 0], suffix(own)], axis=1)
            for shared, own in (
                (cache.prompt_keys, cache.keys),
                (cache.prompt_values, cache.values),
            )
        )
        slots = jnp.arange(cache.prompt_keys.count)[None, None]
        in_prompt = slots < cache.prompt_lengths[prompts][:, None, None]
        in_own = jnp.arange(most * size)[None, None] <= at[..., None]
        in_prompt = jnp.broadcast_to(in_prompt, (*at.shape, in_prompt.shape[-1]))
        visible = jnp.concatenate([in_prompt, in_own], axis=2)
        return self._attend(x @ params["q"], keys, values, visible), cache

    def _embed(self, params, tokens, positions, vision_index, features):
        x = params["embed"][tokens]
        if features is not None:
            seen = jnp.take_along_axis(
                features.tokens, jnp.maximum(vision_index, 0)[..., None], axis=1
            )
            x = jnp.where(vision_index[..., None] >= 0, seen, x)
        waves = 0.5 ** jnp.arange(self.width, dtype=jnp.float32)
        return x + jnp.sin(
            positions.sum(-1)[..., None].astype(jnp.float32) / 3.0 * waves[None, None]
        )

    def _attend(self, query, keys, values, visible):
        scores = jnp.einsum("btd,bsd->bts", query, keys) * self.width**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bts,bsd->btd", weights, values)

    def logits(self, params, hidden):
        return (self.sharpness * hidden @ params["head"]).astype(jnp.float32)


class SentinelReader:
    """Remembers every file and window that was asked for; some windows cannot be decoded."""

    def __init__(self, broken_from: float = 1e9) -> None:
        self.opened: list[str] = []
        self.clips: list[tuple[float, float]] = []
        self.broken_from = broken_from

    def overview(self, video: VideoRef, count: int) -> Frames:
        return self._frames(video)

    def clip(self, video: VideoRef, start: float, end: float, tokens: int | None = None) -> Frames:
        if start >= self.broken_from:
            raise OSError(f"cannot decode {video.path}")
        self.clips.append((start, end))
        return self._frames(video)

    def frames_at(self, video: VideoRef, times: Sequence[float]) -> Frames:
        frames = self._frames(video)
        return Frames(np.repeat(frames.pixels, len(times), axis=0), np.asarray(times))

    def _frames(self, video: VideoRef) -> Frames:
        self.opened.append(video.path)
        return Frames(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1))
