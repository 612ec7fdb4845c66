"""The rollout engine against what a user would otherwise take, and against itself.

    python benchmarks/rollout.py generate [--size 5M|240M] [--prompt 1024] [--frames 0]
    python benchmarks/rollout.py prefix   one cache per prompt against one per rollout
    python benchmarks/rollout.py crops    four crops in one turn against one and four turns
    python benchmarks/rollout.py mix      mixed lengths on few slots against fixed batches
    python benchmarks/rollout.py int8     keys and values in int8: memory, time, log-probs

Both sides of a ratio run in one process, in turns, on the same random weights; median and spread
(smallest to largest) of `--repeats` runs. `generate` needs torch.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, from_pretrained
from paravt_jax.params import initialise
from paravt_jax.records import Patches, Prompt
from paravt_jax.rope_index import mrope_positions, vision_index
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.engine.slots import StreamId

NEW = 64
IMAGE, VIDEO, START, END = 120, 121, 122, 123
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": 16,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [1, 2],
}
SIZES = {
    "5M": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "240M": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


def config_dict(size: str) -> dict:
    """config.json of a text model of this size with a small vision tower."""
    text = SIZES[size]
    quarter = text["head_dim"] // 8
    rope = {"rope_type": "default", "rope_theta": 5e6}
    rope["mrope_section"] = [2 * quarter, quarter, quarter]
    return {
        "model_type": "qwen3_vl",
        "text_config": {**text, "rope_parameters": rope},
        "vision_config": {**VISION, "out_hidden_size": text["hidden_size"]},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": True,
    }


def make_prompt(tokens: int, frames: int, config: Qwen3VLConfig, seed: int = 0) -> Prompt:
    """Random text, after `frames` frames of 8 x 8 patches (16 vision tokens) with their marks."""
    rng = np.random.default_rng(seed)
    shown = [t for _ in range(frames) for t in (START, *[IMAGE] * 16, END)]
    ids = np.array([*shown, *rng.integers(200, 4000, tokens - len(shown))], np.int32)
    visual, grids = ids == IMAGE, np.full((frames, 2), 8, np.int32)
    patches = None
    if frames:
        values = rng.normal(size=(frames, 64, config.vision.patch_values)).astype(np.float32)
        patches = Patches(values, grids)
    return Prompt(
        ids, mrope_positions(visual, grids, 2), vision_index(visual, grids, 2, 64), patches
    )


def compare(
    runs: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, in turns; the first of each, which compiles, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = clock()
            run()
            if repeat:
                seconds[name].append(clock() - began)
    for name, values in seconds.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:<28} {statistics.median(values):8.3f} s  ({spread})", flush=True)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> None:
    """How many times faster `fast` is: the median of the ratios of neighbouring runs."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    print(
        f"{slow} / {fast}: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def run_all(session: Session, pool: str, prompts: list[Prompt], copies: int, limit: int) -> int:
    """Every copy of every prompt generates one turn; tokens generated."""
    for at, prompt in enumerate(prompts):
        for stream in session.open(pool, prompt, range(at * copies, (at + 1) * copies)):
            session.generate(stream, [], SamplingConfig(), limit)
    generated = 0
    while session.generating:
        for stream, turn in session.step():
            generated += len(turn.tokens)
            session.close(stream)
    return generated


def engine_of(policy: Qwen3VLPolicy, pools: dict[str, SlotPool], **options) -> Engine:
    """No token ends a turn: every run generates as many."""
    automata = TokenAutomata([b""] * policy.config.text.vocab_size, [], reserve=2)
    return Engine(policy, pools, automata=automata, pad_id=0, frame_patches=64, **options)


def floor_seconds(policy: Qwen3VLPolicy, params: dict, prompt: int, copies: int) -> float:
    """What the matrix products of the prompt and the bytes of decoding take alone, measured on
    this machine: one large product for its rate, one pass over the weights for the bandwidth."""
    weights = sum(p.size for name, p in params.items() if name.startswith("text."))
    square, thin = jnp.ones((2048, 2048)), jnp.ones((copies, 2048))
    wide = jnp.ones((2048, 16384))
    product = jax.jit(jnp.matmul)

    def best(a, b) -> float:
        product(a, b).block_until_ready()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            product(a, b).block_until_ready()
            times.append(time.perf_counter() - began)
        return min(times)

    rate, bandwidth = 2 * 2048**3 / best(square, square), wide.nbytes / best(thin, wide)
    text = policy.config.text
    cache = 8 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * prompt
    return 2 * weights * prompt / rate + NEW * (4 * weights + cache) / bandwidth


def generate(size: str, length: int, frames: int, repeats: int) -> None:
    """Eight rollouts of one prompt, 64 new tokens each, against `transformers` generate."""
    import torch
    from transformers import Qwen3VLConfig as TorchConfig
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    reference = Qwen3VLForConditionalGeneration(TorchConfig(**config_dict(size))).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = from_pretrained(folder)
    prompt = make_prompt(length, frames, model.config)
    engine = engine_of(model.policy, {"main": SlotPool(1, 8, length, NEW)}, steps_per_call=NEW)
    inputs = {"input_ids": torch.tensor(prompt.tokens[None], dtype=torch.long)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if prompt.patches is not None:
        values = np.asarray(prompt.patches.values)
        pixels = values.reshape(-1, values.shape[-1])
        grids = np.concatenate([np.ones((frames, 1), np.int64), prompt.patches.grids], axis=1)
        inputs |= {"pixel_values": torch.tensor(pixels), "image_grid_thw": torch.tensor(grids)}

    def theirs() -> None:
        with torch.no_grad():
            out = reference.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                num_return_sequences=8,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                pad_token_id=0,
            )
        assert out.shape == (8, length + NEW)

    def ours() -> None:
        assert run_all(Session(engine, model.params), "main", [prompt], 8, NEW) == 8 * NEW

    seconds = compare({"transformers": theirs, "paravt_jax": ours}, repeats)
    ratio(seconds, "transformers", "paravt_jax")
    alone = floor_seconds(model.policy, model.params, length, 8)
    took = statistics.median(seconds["paravt_jax"])
    print(f"products and bytes alone: {alone:.3f} s, {100 * alone / took:.0f} % of ours")


def random_model(size: str) -> tuple[Qwen3VLPolicy, dict]:
    policy = Qwen3VLPolicy(Qwen3VLConfig.from_dict(config_dict(size)))
    return policy, initialise(policy.table, jax.random.key(0))


def prefix(size: str, length: int, repeats: int) -> None:
    """One cache for a prompt of eight rollouts, against a copy for each: prefilling the prompt (and
    drawing one token), then decoding."""
    policy, params = random_model(size)
    prompt = make_prompt(length, 0, policy.config)
    shared = engine_of(policy, {"main": SlotPool(1, 8, length, NEW + 1)}, steps_per_call=NEW)
    copied = engine_of(policy, {"main": SlotPool(8, 1, length, NEW + 1)}, steps_per_call=NEW)
    live: dict[str, tuple[Session, list[StreamId]]] = {}

    def prefill(kind: str) -> None:
        session = Session(shared if kind == "shared" else copied, params)
        prompts, copies = (1, 8) if kind == "shared" else (8, 1)
        seeds = np.arange(8).reshape(prompts, copies)
        streams = [s for own in seeds for s in session.open("main", prompt, own.tolist())]
        live[kind] = session, streams
        generate_all(session, streams, 1)

    runs = {}
    for kind in ("shared", "copied"):
        runs[f"prefill {kind}"] = functools.partial(prefill, kind)
        runs[f"decode {kind}"] = lambda kind=kind: generate_all(*live[kind], NEW)
    seconds = compare(runs, repeats)
    for part in ("prefill", "decode"):
        ratio(seconds, f"{part} copied", f"{part} shared")


def generate_all(session: Session, streams: list[StreamId], limit: int) -> None:
    """All streams go on for as many tokens."""
    for stream in streams:
        session.generate(stream, [], SamplingConfig(), limit)
    while session.generating:
        session.step()


def crops(size: str, length: int, repeats: int) -> None:
    """Reports on one crop, on four at once, and on four one after the other."""
    policy, params = random_model(size)
    engine = engine_of(policy, {"crop": SlotPool(4, 1, length, NEW)})
    prompts = [make_prompt(length, 4, policy.config, seed) for seed in range(4)]

    def at_once(count: int) -> None:
        run_all(Session(engine, params), "crop", prompts[:count], 1, NEW)

    def in_turn() -> None:
        for prompt in prompts:
            run_all(Session(engine, params), "crop", [prompt], 1, NEW)

    seconds = compare(
        {
            "one crop": lambda: at_once(1),
            "four at once": lambda: at_once(4),
            "four in turn": in_turn,
        },
        repeats,
    )
    ratio(seconds, "four at once", "one crop")
    ratio(seconds, "four at once", "four in turn")


def mix(size: str, repeats: int) -> None:
    """64 requests of geometric lengths (mean 60, at most 512) on 16 slots, against batches of 16
    that wait for their longest."""
    policy, params = random_model(size)
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 60, 64), 512)
    prompt = make_prompt(64, 0, policy.config)
    engine = engine_of(policy, {"main": SlotPool(16, 1, 64, 512)}, grows_from=0)

    def run(batches: list[np.ndarray]) -> None:
        session = Session(engine, params)
        for batch in batches:
            for number, limit in enumerate(batch):
                (stream,) = session.open("main", prompt, [number])
                session.generate(stream, [], SamplingConfig(), int(limit))
            while session.generating:
                for stream, _ in session.step():
                    session.close(stream)

    seconds = compare(
        {"fixed batches": lambda: run(np.split(lengths, 4)), "continuous": lambda: run([lengths])},
        repeats,
    )
    ratio(seconds, "fixed batches", "continuous")
    took, most = engine.caches.take_peak() / 2**20, engine.cache_bytes() / 2**20
    print(f"{lengths.sum()} tokens, cache {took:.2f} MiB, {most:.2f} at most")


def int8(size: str, length: int, repeats: int) -> None:
    """Eight rollouts of one prompt on a cache in int8 and in the compute dtype: bytes, seconds, and
    how far their log-probs are from those of the learner's forward pass without a cache."""
    full, params = random_model(size)
    prompt = make_prompt(length, 0, full.config)
    engines = {
        kept: engine_of(
            dataclasses.replace(full, cache_dtype=kept),
            {"main": SlotPool(1, 8, length, NEW)},
            steps_per_call=NEW,
        )
        for kept in ("compute", "int8")
    }
    for kept, engine in engines.items():
        gaps = log_prob_gaps(engine, full, params, prompt)
        print(
            f"{kept}: {engine.cache_bytes() / 2**20:.2f} MiB, log-probs differ by "
            f"{gaps.mean():.2e} on average, {gaps.max():.2e} at most ({gaps.size} tokens)",
            flush=True,
        )
    runs = {
        kept: lambda engine=engine: run_all(Session(engine, params), "main", [prompt], 8, NEW)
        for kept, engine in engines.items()
    }
    ratio(compare(runs, repeats), "int8", "compute")


def log_prob_gaps(
    engine: Engine, policy: Qwen3VLPolicy, params: dict, prompt: Prompt
) -> np.ndarray:
    """`[8, NEW]`: |sampler's - learner's log-prob| of each token of eight rollouts."""
    session = Session(engine, params)
    streams = session.open("main", prompt, range(8))
    for stream in streams:
        session.generate(stream, [], SamplingConfig(), NEW)
    turns = dict(session.step())
    said, sampled = (
        np.stack([getattr(turns[stream], name) for stream in streams])
        for name in ("tokens", "log_probs")
    )
    tokens = np.concatenate([np.tile(prompt.tokens, (8, 1)), said], axis=1)
    at = np.arange(tokens.shape[1], dtype=np.int32)
    positions = np.broadcast_to(at[:, None], (*tokens.shape, 3))
    hidden = jax.jit(policy.hidden)(params, tokens, positions, np.full_like(tokens, -1))
    logits = policy.logits(params, hidden[:, -NEW - 1 : -1])
    learned = jnp.take_along_axis(jax.nn.log_softmax(logits), said[..., None], axis=-1)[..., 0]
    return np.abs(sampled - np.asarray(learned))


def main() -> None:
    parser = argparse.ArgumentParser(description="The rollout engine against its alternatives.")
    parser.add_argument("what", choices=("generate", "prefix", "crops", "mix", "int8"))
    parser.add_argument("--size", choices=SIZES, default="5M")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--frames", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    a = parser.parse_args()
    if a.what == "generate":
        generate(a.size, a.prompt or 1024, a.frames, a.repeats)
    elif a.what == "prefix":
        prefix(a.size, a.prompt or 4096, a.repeats)
    elif a.what == "crops":
        crops(a.size, a.prompt or 256, a.repeats)
    elif a.what == "int8":
        int8(a.size, a.prompt or 512, a.repeats)
    else:
        mix(a.size, a.repeats)


if __name__ == "__main__":
    main()
