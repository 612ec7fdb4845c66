"""What the engine samples is what a full forward pass would predict, for every batching."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import pytest

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, TextConfig, VisionConfig
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise, param_shardings
from paravt_jax.records import Prompt, StopReason
from paravt_jax.shapes import bucket
from rollout.engine import Engine, Generated
from rollout.sampler import SamplingConfig
from tests.rollout_fakes import IM_END, PAD, VOCAB, ToyPolicy, image_prompt, text_prompt

POLICY = ToyPolicy()
PARAMS = POLICY.init()
PROMPTS = [
    image_prompt("what?", frames=3, patches=8, seed=1),
    text_prompt("no frames here"),
    image_prompt("and this one", frames=2, patches=16, seed=2),
]
SAMPLING = SamplingConfig(temperature=1.0)
GREEDY = SamplingConfig(temperature=0.0)


def make_engine(eos_ids=(IM_END, PAD)) -> Engine:
    return Engine(POLICY, eos_ids=eos_ids, pad_id=PAD)


ENGINE = make_engine()
"""Shared where nothing is counted, so that shapes compile once."""


def start(prompts=PROMPTS, copies=1, suffix=64, batch=3):
    return ENGINE.start(PARAMS, prompts, copies, suffix, batch)


def full_log_probs(
    prompt: Prompt, stream: list[int], policy=POLICY, params=PARAMS, temperature: float = 1.0
) -> np.ndarray:
    """`[t, vocab]`: what predicts each token of the stream, by the learner's path (no cache)."""
    start, first = len(prompt.tokens), int(prompt.positions.max()) + 1
    tokens = np.full((1, 128), PAD, np.int32)
    tokens[0, : start + len(stream)] = [*prompt.tokens, *stream]
    positions = first + np.arange(128, dtype=np.int32)[None, :, None].repeat(3, axis=2) - start
    positions[0, :start] = prompt.positions
    index = np.full((1, 128), -1, np.int32)
    index[0, :start] = prompt.vision_index
    patches = prompt.patches and (prompt.patches.values[None], prompt.patches.grids[None])
    logits = _full_logits(policy, params, tokens, positions, index, patches)
    logits = logits[0, start - 1 : start - 1 + len(stream)]
    return np.asarray(jax.nn.log_softmax(logits / temperature))


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(policy, params, tokens, positions, index, patches):
    features = None if patches is None else policy.encode(params, *patches)
    hidden, _ = policy.hidden(params, tokens, positions, index, features)
    return policy.logits(params, hidden)


def speak(session, active=None, sampling=SAMPLING, limit=12, seeds=None) -> list[Generated | None]:
    active = [True] * session.rows if active is None else active
    seeds = list(range(session.rows)) if seeds is None else seeds
    return session.generate(active, sampling, limit, seeds)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_full_forward_over_two_turns(temperature):
    session = start(copies=2)
    sampling = SamplingConfig(temperature=temperature)
    first = speak(session, sampling=sampling)
    given_B = [[65 + row] * row for row in range(6)]
    session.append(given_B)
    second = speak(session, sampling=sampling)
    for row, (one, given, two) in enumerate(zip(first, given_B, second, strict=True)):
        stream = [*one.tokens, *given, *two.tokens]
        table = full_log_probs(PROMPTS[row // 2], stream, temperature=temperature)
        expected = np.take_along_axis(table, np.asarray(stream)[:, None], axis=1)[:, 0]
        got = np.concatenate([one.log_probs, expected[len(one.tokens) :][:row], two.log_probs])
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_greedy_is_the_argmax_of_a_full_forward():
    session = start()
    for prompt, turn in zip(PROMPTS, speak(session, sampling=GREEDY, limit=24), strict=True):
        table = full_log_probs(prompt, turn.tokens.tolist())
        np.testing.assert_array_equal(turn.tokens, table.argmax(-1))


def test_pixels_reach_the_samples():
    other = image_prompt("what?", frames=3, patches=8, seed=7)
    turns = [
        speak(start([prompt, PROMPTS[2]]), sampling=GREEDY)[0] for prompt in (PROMPTS[0], other)
    ]
    assert turns[0].tokens.tolist() != turns[1].tokens.tolist()


def test_samples_do_not_depend_on_order_padding_or_capacity():
    alone = [speak(start([prompt]), seeds=[100 + row])[0] for row, prompt in enumerate(PROMPTS)]
    for batch, suffix in ((3, 64), (5, 72)):
        session = start(PROMPTS[::-1], suffix=suffix, batch=batch)
        together = speak(session, seeds=[102, 101, 100])[::-1]
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_copies_differ_by_seed_only():
    turns = [turn.tokens.tolist() for turn in speak(start(copies=2), seeds=[5, 6, 7, 8, 9, 9])]
    assert turns[0] != turns[1] and turns[4] == turns[5]


def test_inactive_rows_stay_as_they_are():
    paused = start()
    assert speak(paused, active=[True, False, True])[1] is None
    paused.append([[66], [], [66, 67]])
    late, prompt_only = speak(paused)[1], speak(start())[1]
    np.testing.assert_array_equal(late.tokens, prompt_only.tokens)
    np.testing.assert_allclose(late.log_probs, prompt_only.log_probs, atol=1e-5)


def test_a_turn_ends_at_its_stop_token_or_its_limit():
    free = speak(start(), sampling=GREEDY, limit=20)[0]
    stop = int(free.tokens[4])
    at = free.tokens.tolist().index(stop)
    stopping = make_engine(eos_ids=(stop,))
    (ended,) = speak(stopping.start(PARAMS, PROMPTS[:1], 1, suffix=20), sampling=GREEDY, limit=20)
    assert ended.stop_reason is StopReason.END
    np.testing.assert_array_equal(ended.tokens, free.tokens[: at + 1])
    (cut,) = speak(stopping.start(PARAMS, PROMPTS[:1], 1, suffix=20), sampling=GREEDY, limit=at)
    assert cut.stop_reason is StopReason.LENGTH
    np.testing.assert_array_equal(cut.tokens, free.tokens[:at])


def test_settings_do_not_recompile():
    engine = make_engine()
    session = engine.start(PARAMS, PROMPTS, copies=2, suffix=64)
    session.append([[65]] * 6)
    speak(session, limit=3)
    before = engine.compilations
    session.append([[65, 66, 67]] * 6)
    speak(session, [True, False] * 3, SamplingConfig(temperature=0.3, top_p=0.5), limit=9)
    speak(engine.start(PARAMS, PROMPTS[::-1], copies=2, suffix=64), sampling=GREEDY)
    assert (before, engine.compilations) == (4, 4)


def test_a_row_cannot_outgrow_its_cache():
    session = make_engine(eos_ids=(200,)).start(PARAMS, PROMPTS[:1], copies=1, suffix=10)
    speak(session, limit=8)
    with pytest.raises(ValueError, match="room for 2 more tokens, not 3"):
        session.append([[65, 65, 65]])
    with pytest.raises(ValueError, match="room for 2 more tokens, not 3"):
        speak(session, limit=3)
    session.append([[65, 65]])
    assert session.room.tolist() == [0]


def test_cache_bytes_are_known_beforehand():
    session = start(copies=2, suffix=32)
    longest = max(len(prompt.tokens) for prompt in PROMPTS)
    actual = sum(leaf.nbytes for leaf in jax.tree.leaves(session._state.cache))
    assert ENGINE.cache_bytes(longest, suffix=32, rows=6) == actual


@pytest.mark.parametrize(("copies", "batch"), [(0, None), (1, 2)])
def test_start_refuses_impossible_batches(copies, batch):
    with pytest.raises(ValueError, match="copies"):
        start(copies=copies, batch=batch)


def test_values_must_come_per_row():
    session = start()
    with pytest.raises(ValueError, match="2 values for 3 rows"):
        session.append([[65], [65]])


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 33)] == [
        *(1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
    ]
    assert bucket(3, minimum=8) == 8


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2", "data:3"])
def test_a_mesh_changes_no_sample(mesh):
    alone = speak(start(copies=4))
    count = 3 if mesh == "data:3" else 8
    with jax.set_mesh(make_mesh(parse_mesh(mesh, count), jax.devices()[:count])):
        spread = speak(make_engine().start(PARAMS, PROMPTS, copies=4, suffix=64))
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


QWEN = Qwen3VLPolicy(
    Qwen3VLConfig(
        text=TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mrope_section=(2, 1, 1),
            # Large weights, so that the model has opinions and an error shows.
            initializer_range=0.3,
        ),
        vision=VisionConfig(
            depth=1,
            hidden_size=32,
            intermediate_size=24,
            num_heads=2,
            patch_size=4,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=(0,),
            initializer_range=0.3,
        ),
        tie_word_embeddings=True,
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "data:2,fsdp:2,tensor:2"])
def test_qwen3_vl_log_probs_equal_the_learners(mesh):
    width = QWEN.config.vision.patch_values
    prompts = [
        image_prompt("what?", frames=3, patches=8, seed=1, values=width),
        image_prompt("and here", frames=2, patches=16, seed=2, values=width),
    ]
    params = initialise(QWEN.table, jax.random.key(0))
    engine = Engine(QWEN, eos_ids=(IM_END,), pad_id=PAD)
    with contextlib.ExitStack() as stack:
        live = params
        if mesh is not None:
            devices = make_mesh(parse_mesh(mesh, 8))
            stack.enter_context(jax.set_mesh(devices))
            live = jax.device_put(params, param_shardings(QWEN.table, devices))
        session = engine.start(live, prompts, copies=2, suffix=64)
        first = speak(session)
        session.append([[65] * (3 * row) for row in range(4)])
        second = speak(session)
    for row, (one, two) in enumerate(zip(first, second, strict=True)):
        stream = [*one.tokens, *[65] * (3 * row), *two.tokens]
        table = full_log_probs(prompts[row // 2], stream, QWEN, params)
        expected = np.take_along_axis(table, np.asarray(stream)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(one.log_probs, expected[: len(one.tokens)], atol=1e-4)
        np.testing.assert_allclose(two.log_probs, expected[-len(two.tokens) :], atol=1e-4)
        assert expected.std() > 0.1
