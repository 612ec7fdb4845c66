"""PARA-GRPO on one page: a tiny Qwen3-VL learns from rewards alone to search long videos.

    python examples/para_grpo.py

ParaVT (arXiv 2605.20342) in the order of the paper, on a model that is pure functions of weights:
`encode` frames, `prefill`, `append` to a KV cache, `hidden` states of whole streams, `logits`.

1. Parallel crops (`roll_out`). The agent sees a few frames of a video, thinks, and calls
   `crop_video` several times in one turn. Sub-agents with the same weights watch all of these
   windows side by side, and the agent answers from what they report.
2. Anchored format (`advantages`). Sampled at a temperature, the tags of thoughts, calls and answers
   decay. What a turn earns for its format therefore goes to the tokens of its tags, not to all.
3. Frame gating (`roll_out`). How many frames the agent sees, K, is drawn for each prompt: the fewer
   they are, the more a crop is worth.

`docs/para_grpo.md` has the equations. `train/main.py` is this at scale: on the same rollouts its
loss and its gradient are those of this page (`tests/semantics/test_one_page.py`).
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from models.qwen3_vl import from_pretrained  # noqa: E402
from paravt_jax.blocks import whole_stream  # noqa: E402
from paravt_jax.patches import largest, stack_patches  # noqa: E402
from paravt_jax.protocol import CROP_VIDEO_TOOL, crop_window, parse_tool_calls  # noqa: E402
from paravt_jax.records import Prompt, Row  # noqa: E402
from paravt_jax.rewards import RewardBreakdown, score  # noqa: E402
from paravt_jax.rewards.schemes.paravt import turn_anchors  # noqa: E402
from paravt_jax.structure import ANCHOR_TAGS, structural_tokens, tag_credit, tag_table  # noqa: E402
from pipelines.datasets import needle_questions  # noqa: E402
from pipelines.needle.traces import NEEDLE_TEXTS, PREFIX  # noqa: E402
from pipelines.needle.world import NeedleWorld  # noqa: E402
from pipelines.render import ChatRenderer  # noqa: E402
from pipelines.video import VideoReader  # noqa: E402

GROUP = 8  # G: rollouts of each prompt, which are compared with one another
FRAMES, CROP_FRAMES = (4, 8), 16  # choices of K; most frames of a crop
CALLS = 4  # most calls of a turn that are answered
TURN, REPORT, ANSWER = 156, 32, 32  # most tokens of a first turn, of a report, of an answer
TEMPERATURE = 1.0  # of the agent; sub-agents are greedy
ANCHOR, KL, CLIP, CAP = 0.5, 0.05, 0.2, 5.0  # weights of anchor and divergence; bounds of ratios
ROWS, LENGTHS = int(os.environ.get("ROWS", "64")), 128  # static: rows of a batch, unit of lengths

FOLDER = ROOT / "train" / "assets" / "needle_sft"  # the cold start: a million weights
MODEL = from_pretrained(FOLDER)
POLICY, PIXELS = MODEL.policy, (32 * 32, 32 * 32)
RENDERER = ChatRenderer.from_folder(str(FOLDER), "image", NEEDLE_TEXTS, PIXELS, [CROP_VIDEO_TOOL])
READER = VideoReader(crop_cap=CROP_FRAMES, spec=RENDERER.spec)
TAGS = tag_table(RENDERER.token_contents(POLICY.config.text.vocab_size))
HEAD, END = RENDERER.encode(PREFIX), RENDERER.eos_ids[0]  # forced `<think>`, and `<|im_end|>`


# --- Rollouts: think and call, watch all crops side by side, answer ------------------------------
@dataclass
class Rollout:
    """One attempt at a question: a stream of tokens that only ever grows at its end."""

    row: Row
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)  # all after the prompt, and of each:
    turns: list[int] = field(default_factory=list)  # its turn, from 1; 0 in tool responses
    log_probs: list[float] = field(default_factory=list)  # the sampler's; NaN if not sampled
    texts: list[str] = field(default_factory=list)  # what the agent said in each turn
    crops: int = 0  # calls that ran

    def append(self, tokens: list[int], turn: int, log_probs: list[float] | None = None) -> None:
        self.tokens += tokens
        self.turns += [turn] * len(tokens)
        self.log_probs += log_probs or [np.nan] * len(tokens)

    @property
    def windows(self) -> list[Any]:
        """Start and end, in seconds, of each crop that the last turn calls for, or an error."""
        calls = parse_tool_calls(self.texts[-1]) if self.tokens[-1] == END else ()
        windows: list[Any] = [crop_window(call, self.row.video.duration) for call in calls]
        return windows[:CALLS] + [f"at most {CALLS} calls per turn"] * (len(calls) - CALLS)

    @property
    def reward(self) -> RewardBreakdown:
        """R = accuracy + format + tool, by term; `task` is R without the anchor."""
        kind, turns, executed = self.row.question_type, self.texts, self.crops
        return score("".join(turns), self.row.answer, kind, turns=turns, executed_calls=executed)


def roll_out(params: Any, rows: list[Row], rng: np.random.Generator) -> list[list[Rollout]]:
    """G rollouts of each question, all of which see the same K frames."""
    keys = jax.random.split(jax.random.key(rng.integers(2**32)), 3)
    views = [READER.overview(row.video, int(rng.choice(FRAMES))) for row in rows]
    prompts = [RENDERER.main_prompt(*pair, tools=True) for pair in zip(rows, views, strict=True)]
    rollouts = [Rollout(*p) for p in zip(rows, prompts, strict=True) for _ in range(GROUP)]
    generate(params, rollouts, TURN, keys[0], copies=GROUP)
    callers = [rollout for rollout in rollouts if rollout.windows]
    answer_calls(params, callers, keys[1])
    generate(params, callers, ANSWER, keys[2])
    return [rollouts[start : start + GROUP] for start in range(0, len(rollouts), GROUP)]


def answer_calls(params: Any, rollouts: list[Rollout], key: jax.Array) -> None:
    """Answer the calls of all rollouts at once: a sub-agent with the same weights watches each
    window, and its report, not what it saw, enters the stream of the agent."""
    crops = [(rollout.row, window) for rollout in rollouts for window in rollout.windows]
    subagents = {}  # one for each window of a video: two greedy ones would report the same
    for row, window in dict.fromkeys(crop for crop in crops if isinstance(crop[1], tuple)):
        prompt = RENDERER.subagent_prompt(READER.clip(row.video, *window), *window)
        subagents[row, window] = Rollout(row, prompt)
    generate(params, list(subagents.values()), REPORT, key, head=[], temperature=0.0)
    reports = {crop: subagent.texts[0] for crop, subagent in subagents.items()}
    for rollout in rollouts:
        crops = [(rollout.row, window) for window in rollout.windows]
        rollout.crops = sum(crop in reports for crop in crops)
        responses = [reports.get(crop, f"Error: {crop[1]}") for crop in crops]
        rollout.append(RENDERER.tool_turn(responses), turn=0)


# --- Sampling: prefill, then decode with a KV cache ----------------------------------------------
def stack(rollouts: list[Rollout]) -> tuple[np.ndarray, ...]:
    """What the model reads, padded to few shapes: tokens [n, t], M-RoPE positions [n, t, 3], which
    vision token stands where [n, t] (-1: text), lengths [n], patches of frames and their grids."""
    streams = [whole_stream(r.prompt, np.array(r.tokens, np.int32)) for r in rollouts]
    lengths = np.array([len(stream.tokens) for stream in streams])
    length, shown = -(-lengths.max() // LENGTHS) * LENGTHS, [stream.patches for stream in streams]
    return (
        padded([stream.tokens for stream in streams], length),
        padded([stream.positions for stream in streams], length),
        padded([stream.vision_index for stream in streams], length, value=-1),
        lengths,
        *stack_patches(shown, CROP_FRAMES, largest(shown)[1]),
    )


def padded(rows: list[Any], length: int, value: float = 0, start: int = 0) -> np.ndarray:
    """Rows from `start` on in an array [n, length, ...], which elsewhere holds a value."""
    out = np.full((len(rows), length, *np.shape(rows[0])[1:]), value, np.asarray(rows[0]).dtype)
    for whole, row in zip(out, rows, strict=True):
        whole[start : start + len(row)] = row
    return out


def generate(params, rollouts, limit, key, copies=1, head=HEAD, temperature=TEMPERATURE):
    """One turn of each rollout; every `copies` neighbours are alike so far and share a prefill."""
    for rollout in rollouts:
        rollout.append(head, len(rollout.texts) + 1)
    for start in range(0, len(rollouts), ROWS):
        part, part_key = rollouts[start : start + ROWS], jax.random.fold_in(key, start)
        batch = part[::copies] + part[-1:] * ((ROWS - len(part)) // copies)  # filled up: one shape
        sampled = jax.device_get(sample(params, stack(batch), part_key, limit, copies, temperature))
        for rollout, tokens, log_probs in zip(part, *(x.tolist() for x in sampled), strict=False):
            end = tokens.index(END) + 1 if END in tokens else limit
            rollout.append(tokens[:end], len(rollout.texts) + 1, log_probs[:end])
            rollout.texts.append(RENDERER.decode(head + tokens[:end]))


@jax.jit(static_argnames=("limit", "copies", "temperature"))
def sample(params, streams, key, limit, copies, temperature):
    """Prefill each stream once, then decode `limit` tokens in each of its `copies` rows."""
    tokens, positions, vision_index, lengths, patches, grids = streams
    features = POLICY.encode(params, patches, grids)
    hidden, keys, values = POLICY.prefill(params, tokens, positions, vision_index, features)
    cache = POLICY.init_cache(len(tokens), copies, tokens.shape[1], limit)
    cache = cache.with_prompts(jnp.arange(len(tokens)), keys, values)
    cache = replace(cache, prompt_lengths=lengths)
    last = jnp.arange(len(tokens)), lengths - 1
    hidden, position = (jnp.repeat(x[last], copies, axis=0) for x in (hidden, positions))

    def decode(carry, step):
        hidden, cache = carry
        scores = jax.nn.log_softmax(POLICY.logits(params, hidden) / (temperature or 1.0))
        token = scores.argmax(axis=-1)
        if temperature:
            token = jax.random.categorical(jax.random.fold_in(key, step), scores)
        log_prob = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
        block = token[:, None], (position + 1 + step)[:, None], jnp.full((len(token), 1), -1)
        hidden, (cache,) = POLICY.append(params, *block, None, (cache,))
        return (hidden[:, 0], replace(cache, lengths=cache.lengths + 1)), (token, log_prob)

    _, (sampled, log_probs) = jax.lax.scan(decode, (hidden, cache), jnp.arange(limit))
    return sampled.T, log_probs.T


# --- Advantages: what each token is worth --------------------------------------------------------
def normalised(rewards: np.ndarray) -> np.ndarray:
    """A_i = (r_i - mean) / (std + eps) over the rollouts of a prompt (GRPO); 0 for a NaN."""
    finite = rewards[np.isfinite(rewards)]
    std = finite.std(ddof=1) if len(finite) > 1 else 1.0
    return np.nan_to_num((rewards - finite.mean()) / (std + 1e-5))


def advantages(group: list[Rollout], tokens: np.ndarray, turns: np.ndarray) -> jax.Array:
    """A_t = A_task + ANCHOR * A_anchor,t of the tokens of a group, [g, t].

    All tokens of a rollout share A_task, its reward among those of the group. The anchor of a turn
    has two parts, thinking (did the thought end?) and acting (did a call or an answer follow?).
    Each is compared among the turns of one number, and goes to the tags that it is about: praise
    to tags in their place, blame to those that stand where another should have stood."""
    task = normalised(np.array([rollout.reward.task for rollout in group]))
    parts = np.full((2, len(group), turns.max()), np.nan)
    for number, rollout in enumerate(group):
        for turn, anchor in enumerate(turn_anchors(rollout.texts)):
            parts[:, number, turn] = anchor.thinking, anchor.acting
    parts = np.apply_along_axis(normalised, 1, parts)
    thinking, acting = (np.take_along_axis(part, turns - 1, axis=1) for part in parts)
    structure = structural_tokens(tokens, TAGS, turns > 0)
    return task[:, None] + ANCHOR * tag_credit(structure, TAGS, ANCHOR_TAGS, thinking, acting)


# --- The loss ------------------------------------------------------------------------------------
def prepare(rollouts: list[Rollout], initial: Any) -> tuple[Any, ...]:
    """What the loss takes of a group: streams, loss mask (what was sampled), log-probs of the
    sampler and of the reference (the initial policy), advantages; all [g, t]."""
    streams = stack(rollouts)
    place = {"length": streams[0].shape[1], "start": len(rollouts[0].prompt.tokens)}
    turns = padded([rollout.turns for rollout in rollouts], **place)
    behaviour = padded([rollout.log_probs for rollout in rollouts], value=np.nan, **place)
    values = behaviour, log_probs_of(initial, streams), advantages(rollouts, streams[0], turns)
    mask = np.isfinite(behaviour)
    return streams, mask, *(np.where(mask, x, 0).astype(np.float32) for x in values)


@jax.jit
def log_probs_of(params: Any, streams: Any) -> jax.Array:
    """log pi(token | those before it), [n, t]; 0 for the first of each stream."""
    tokens, positions, vision_index, _, patches, grids = streams
    features = POLICY.encode(params, patches, grids)
    hidden = POLICY.hidden(params, tokens, positions, vision_index, features)
    scores = jax.nn.log_softmax(POLICY.logits(params, hidden[:, :-1]) / TEMPERATURE)
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def loss_and_gradient(trainable, initial, streams, mask, behaviour, reference, advantage):
    """Of a group, as sums over the tokens of the mask:

        l = max(-A q, -A clip(q, 1 - CLIP, 1 + CLIP)) w [w <= CAP] + KL (exp(-d) - 1 + d)

    q = pi / proximal, where the proximal policy is the one before the step: pi itself, as a batch
    is learned from once. w = proximal / behaviour, learner against sampler, which differ by
    rounding here. d = log pi - log reference."""
    log_probs = jnp.where(mask, log_probs_of({**initial, **trainable}, streams), 0)
    proximal = jax.lax.stop_gradient(log_probs)
    q, w = jnp.exp(log_probs - proximal), jnp.exp(proximal - behaviour)
    surrogate = jnp.maximum(-advantage * q, -advantage * jnp.clip(q, 1 - CLIP, 1 + CLIP))
    d = log_probs - reference
    kl = jnp.minimum(jnp.exp(-d) - 1 + d, 10)  # no token runs away with the batch
    loss = surrogate * jnp.where(w <= CAP, w, 0) + KL * kl
    return loss.sum(), {"kl": kl.sum(), "gap": jnp.abs(proximal - behaviour).sum()}


def accumulate(trainable: Any, initial: Any, groups: list[tuple[Any, ...]]) -> Any:
    """((loss, metrics), gradient) of a batch, as means over its tokens. Groups are added up before
    anything is divided, so that a short one weighs no more than a long one (DAPO)."""
    sums = [loss_and_gradient(trainable, initial, *group) for group in groups]
    count = sum(int(mask.sum()) for _, mask, *_ in groups)
    return jax.tree.map(lambda *parts: sum(parts) / count, *sums)


def main() -> None:
    parser = argparse.ArgumentParser(description="PARA-GRPO on the needle world.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--videos", type=int, default=400, help="of the needle world")
    parser.add_argument("--folder", default="data/needle_world", help="where they are written")
    args, rng = parser.parse_args(), np.random.default_rng(0)
    world = NeedleWorld(train_videos=args.videos, held_out_videos=1)
    questions = needle_questions(world, args.folder, "train", ("oe", "tvg"))
    trainable = {name: x for name, x in MODEL.params.items() if not name.startswith("vision.")}
    rate = optax.linear_schedule(3e-5, 1.5e-4, transition_steps=4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))
    moments = optimizer.init(trainable)
    for step in range(1, args.steps + 1):
        began, chosen = time.perf_counter(), rng.choice(len(questions), args.prompts, replace=False)
        groups = roll_out({**MODEL.params, **trainable}, [questions[i].row for i in chosen], rng)
        batch = [prepare(group, MODEL.params) for group in groups]
        (loss, metrics), gradient = accumulate(trainable, MODEL.params, batch)
        updates, moments = optimizer.update(gradient, moments)
        trainable = optax.apply_updates(trainable, updates)
        earned = [r.reward.as_dict() | {"crops": r.crops} for group in groups for r in group]
        means = jax.tree.map(lambda *values: np.mean(values), *earned) | metrics | {"loss": loss}
        means["seconds"] = time.perf_counter() - began
        print(f"step {step}/{args.steps}", *(f"{k} {v:.2g}" for k, v in means.items()), sep="  ")


if __name__ == "__main__":
    main()
