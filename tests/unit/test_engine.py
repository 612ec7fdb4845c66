"""What the engine samples is what a full forward pass would predict, whatever else it decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise, param_shardings
from paravt_jax.patches import normalised
from paravt_jax.records import Prompt, StopReason
from paravt_jax.rope_index import next_position
from rollout.engine.automaton import TokenAutomata
from rollout.engine.caches import PARTS
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session, VersionedWeights
from rollout.engine.slots import Generated, StreamId
from tests.support.rollout_fakes import IM_END, PAD, VOCAB, ToyPolicy, image_prompt, text_prompt
from tests.support.tiny_models import QWEN

POLICY = ToyPolicy()
PARAMS = POLICY.init()
PROMPTS = [
    image_prompt("what?", frames=3, patches=8, seed=1),
    text_prompt("no frames here"),
    image_prompt("and this one", frames=2, patches=16, seed=2),
]
SAMPLING = SamplingConfig(temperature=1.0)
GREEDY = SamplingConfig(temperature=0.0)
CONTENTS = [bytes([index]) if index < 128 else b"" for index in range(VOCAB)]
POOL = SlotPool(prompts=3, copies=2, prompt_tokens=64, suffix=64, page=8)


def make_engine(pools=POOL, eos_ids=(IM_END, PAD), steps_per_call=5, **options) -> Engine:
    pools = {"main": pools} if isinstance(pools, SlotPool) else pools
    automata = TokenAutomata(CONTENTS, eos_ids)
    return Engine(
        POLICY, pools, automata=automata, pad_id=PAD, steps_per_call=steps_per_call, **options
    )


ENGINE = make_engine()
"""Shared where nothing is counted, so that shapes compile once."""


def finish(session: Session, close: bool = False) -> dict[StreamId, Generated]:
    """Step until all is idle; `close` streams whose turn ended."""
    turns = {}
    while session.generating:
        ended = dict(session.step())
        turns |= ended
        for stream in ended if close else ():
            session.close(stream)
    return turns


def sample_all(
    engine=ENGINE, prompts=PROMPTS, copies=1, sampling=SAMPLING, limit=12, seeds=None, params=PARAMS
) -> list[Generated]:
    """One turn of every copy of every prompt, of at most so many tokens, or each of its own."""
    session, streams = Session(engine, params), []
    for at, prompt in enumerate(prompts):
        own = range(at * copies, (at + 1) * copies)
        streams += session.open("main", prompt, [seeds[i] if seeds else i for i in own])
    limits = [limit] * len(streams) if isinstance(limit, int) else limit
    for stream, own in zip(streams, limits, strict=True):
        session.generate(stream, [], sampling, own)
    turns = finish(session, close=True)
    return [turns[stream] for stream in streams]


def same(one: Generated, other: Generated) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


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
    patches = prompt.patches and (normalised(prompt.patches)[None], prompt.patches.grids[None])
    logits = _full_logits(policy, params, tokens, positions, index, patches)
    logits = logits[0, start - 1 : start - 1 + len(stream)]
    return np.asarray(jax.nn.log_softmax(logits / temperature))


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(policy, params, tokens, positions, index, patches):
    features = None if patches is None else policy.encode(params, *patches)
    hidden = policy.hidden(params, tokens, positions, index, features)
    return policy.logits(params, hidden)


def chosen_log_probs(prompt, stream, **model) -> np.ndarray:
    """`[t]` of the stream's own tokens."""
    table = full_log_probs(prompt, stream, **model)
    return np.take_along_axis(table, np.asarray(stream)[:, None], axis=1)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_full_forward_over_two_turns(temperature):
    """Six rows share three prompts; a turn takes several steps; given tokens differ in length."""
    session, sampling = Session(ENGINE, PARAMS), SamplingConfig(temperature=temperature)
    streams = [s for at, p in enumerate(PROMPTS) for s in session.open("main", p, [at, at + 9])]
    for stream in streams:
        session.generate(stream, [], sampling, 12)
    first = finish(session)
    given_B = [[65 + row] * row for row in range(6)]
    for stream, given in zip(streams, given_B, strict=True):
        session.generate(stream, given, sampling, 12)
    second = finish(session)
    for row, (stream, given) in enumerate(zip(streams, given_B, strict=True)):
        one, two = first[stream], second[stream]
        tokens = [*one.tokens, *given, *two.tokens]
        expected = chosen_log_probs(PROMPTS[row // 2], tokens, temperature=temperature)
        np.testing.assert_allclose(one.log_probs, expected[: len(one.tokens)], atol=1e-4)
        np.testing.assert_allclose(two.log_probs, expected[-len(two.tokens) :], atol=1e-4)


def test_greedy_is_the_argmax_of_a_full_forward():
    for prompt, turn in zip(PROMPTS, sample_all(sampling=GREEDY, limit=24), strict=True):
        table = full_log_probs(prompt, turn.tokens.tolist())
        np.testing.assert_array_equal(turn.tokens, table.argmax(-1))


def test_pixels_reach_the_samples():
    other = image_prompt("what?", frames=3, patches=8, seed=7)
    one, two = (
        sample_all(prompts=[p, PROMPTS[2]], sampling=GREEDY)[0] for p in (PROMPTS[0], other)
    )
    assert one.tokens.tolist() != two.tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pool", "steps_per_call"),
    [
        (SlotPool(prompts=1, copies=1, prompt_tokens=64, suffix=64), 3),
        (SlotPool(prompts=2, copies=1, prompt_tokens=40, suffix=12), 16),
        (SlotPool(prompts=7, copies=3, prompt_tokens=100, suffix=72), 5),
        (SlotPool(prompts=8, copies=2, prompt_tokens=64, suffix=64), 4),
    ],
)
def test_samples_do_not_depend_on_slots_order_capacity_or_steps(pool, steps_per_call):
    expected = sample_all(seeds=[100, 101, 102])
    engine = make_engine(pool, steps_per_call=steps_per_call)
    turned = sample_all(engine, PROMPTS[::-1], seeds=[102, 101, 100])[::-1]
    for one, other in zip(expected, turned, strict=True):
        same(one, other)


@pytest.mark.slow
def test_a_cache_that_grows_changes_no_sample_and_holds_what_is_spoken():
    """Page by page, against rows of one page each."""
    whole = make_engine(dataclasses.replace(POOL, page=64), eos_ids=())
    paged = make_engine(eos_ids=(), grows_from=0)
    limits = [3, 60, 9, 40, 1, 31]
    turns = [sample_all(engine, copies=2, limit=limits) for engine in (whole, paged)]
    for one, other in zip(*turns, strict=True):
        same(one, other)
    grown = paged.caches.take_peak()
    assert paged.cache_bytes(0) < grown == paged.cache_bytes(1) < paged.cache_bytes()
    assert whole.caches.take_peak() == whole.cache_bytes() == whole.cache_bytes(0)


def test_caches_are_given_back_and_made_again():
    engine = make_engine()
    before = sample_all(engine, limit=30)
    held = jax.tree.leaves(engine.caches.states)
    engine.caches.release()
    assert not engine.caches.states
    assert all(leaf.is_deleted() for leaf in held if isinstance(leaf, jax.Array))
    engine.caches.take_peak()
    assert engine.caches.take_peak() == 0
    for one, other in zip(before, sample_all(engine, limit=30), strict=True):
        same(one, other)


def test_copies_differ_by_seed_only():
    turns = sample_all(copies=2, seeds=[5, 6, 7, 8, 9, 9])
    assert turns[0].tokens.tolist() != turns[1].tokens.tolist()
    same(turns[4], turns[5])


def test_idle_rows_stay_as_they_are():
    """A stream that does nothing while the others generate and are given things."""
    session = Session(ENGINE, PARAMS)
    (active,), (idle,) = (session.open("main", p, [i]) for i, p in enumerate(PROMPTS[:2]))
    session.generate(active, [], SAMPLING, 9)
    finish(session)
    session.generate(active, [66, 67], SAMPLING, 9)
    session.generate(idle, [], SAMPLING, 12)
    same(finish(session)[idle], sample_all()[1])


def test_a_session_draws_under_newer_weights_than_it_was_opened_with():
    newer = VersionedWeights(3, POLICY.init(seed=1))
    session = Session(ENGINE, PARAMS, newest=lambda: newer)
    session.generate(*session.open("main", PROMPTS[0], [0]), [], SAMPLING, 12)
    (turn,) = finish(session).values()
    same(turn, sample_all(params=newer.params)[0])
    assert turn.versions.tolist() == [3] * len(turn.tokens)


@pytest.mark.slow
def test_crops_decode_beside_mains_and_take_free_slots():
    """Five crops on two slots, while a main agent generates a long turn."""
    pools = {"main": POOL, "crop": SlotPool(prompts=2, copies=1, prompt_tokens=64, suffix=20)}
    engine = make_engine(pools, eos_ids=())
    session = Session(engine, PARAMS)
    (main,) = session.open("main", PROMPTS[0], [0])
    session.generate(main, [], SAMPLING, 30)
    crops = [s for i in range(5) for s in session.open("crop", PROMPTS[1], [50 + i])]
    for stream in crops:
        session.generate(stream, [], SAMPLING, 6)
    turns, order = {}, []
    while session.generating:
        for stream, turn in session.step():
            turns[stream] = turn
            order.append(stream)
            if stream in crops:
                session.close(stream)
    assert order[:2] == crops[:2] and order[-1] == main
    same(turns[main], sample_all(make_engine(eos_ids=()), PROMPTS[:1], limit=30)[0])
    for number, stream in enumerate(crops):
        alone = make_engine(eos_ids=())
        same(turns[stream], sample_all(alone, [PROMPTS[1]], limit=6, seeds=[50 + number])[0])


@pytest.mark.slow
def test_closed_slots_are_used_again_and_never_leak_into_the_next_stream():
    engine = make_engine(SlotPool(prompts=2, copies=1, prompt_tokens=64, suffix=64))
    session = Session(engine, PARAMS)
    waiting = [s for i in range(9) for s in session.open("main", PROMPTS[i % 3], [i])]
    for stream in waiting:
        session.generate(stream, [65] * 3, SAMPLING, 12)
    turns = finish(session, close=True)
    for number, stream in enumerate(waiting):
        tokens = [65, 65, 65, *turns[stream].tokens]
        expected = chosen_log_probs(PROMPTS[number % 3], tokens)[3:]
        np.testing.assert_allclose(turns[stream].log_probs, expected, atol=1e-4)


def test_frames_can_be_given_in_the_midst_of_a_stream():
    shown = image_prompt("look", frames=2, patches=8, seed=5)
    session = Session(ENGINE, PARAMS)
    (stream,) = session.open("main", PROMPTS[1], [3])
    session.generate(stream, shown, SAMPLING, 10)
    turn = finish(session)[stream]
    offset = next_position(PROMPTS[1].positions)
    whole = dataclasses.replace(
        shown,
        tokens=np.concatenate([PROMPTS[1].tokens, shown.tokens]),
        positions=np.concatenate([PROMPTS[1].positions, shown.positions + offset]),
        vision_index=np.concatenate([PROMPTS[1].vision_index, shown.vision_index]),
    )
    expected = chosen_log_probs(whole, turn.tokens.tolist())
    np.testing.assert_allclose(turn.log_probs, expected, atol=1e-4)


def test_a_turn_ends_at_its_stop_token_or_its_limit():
    free = sample_all(sampling=GREEDY, limit=20)[0]
    stop = int(free.tokens[4])
    at = free.tokens.tolist().index(stop)
    stopping = make_engine(eos_ids=(stop,))
    (ended,) = sample_all(stopping, PROMPTS[:1], sampling=GREEDY, limit=20)
    assert ended.stop_reason is StopReason.END
    np.testing.assert_array_equal(ended.tokens, free.tokens[: at + 1])
    (cut,) = sample_all(stopping, PROMPTS[:1], sampling=GREEDY, limit=at)
    assert cut.stop_reason is StopReason.LENGTH
    np.testing.assert_array_equal(cut.tokens, free.tokens[:at])
    # The last token that is allowed may be the end as well.
    (just,) = sample_all(stopping, PROMPTS[:1], sampling=GREEDY, limit=at + 1)
    assert just.stop_reason is StopReason.END
    asked = SamplingConfig(temperature=0.0, stop_ids=(stop,))
    (stopped,) = sample_all(make_engine(eos_ids=()), PROMPTS[:1], sampling=asked, limit=at + 1)
    assert stopped.stop_reason is StopReason.STOP
    np.testing.assert_array_equal(stopped.tokens, just.tokens)


def test_settings_lengths_and_weights_do_not_recompile():
    engine = make_engine()
    engine.caches.open(-1)
    sample_all(engine, copies=2, limit=3)
    before = engine.compilations
    hotter = SamplingConfig(temperature=0.3, top_p=0.5)
    sample_all(engine, PROMPTS[::-1], copies=2, sampling=hotter, limit=9, params=POLICY.init(1))
    sample_all(engine, copies=2, sampling=GREEDY)
    # Encode frames of two sizes, read with frames and without, decode.
    assert (before, engine.compilations) == (5, 5)


def test_stop_strings_and_penalties_are_per_request():
    engine = make_engine(eos_ids=(), penalties=True)
    free, _ = sample_all(engine, PROMPTS[:2], sampling=GREEDY, limit=20)
    text = "".join(chr(token) for token in free.tokens if token < 128)
    stop = SamplingConfig(temperature=0.0, stop=(text[3:6],))
    repeat = SamplingConfig(temperature=0.0, repetition_penalty=1e9)
    session = Session(engine, PARAMS)
    streams = [session.open("main", PROMPTS[0], [i])[0] for i in range(3)]
    for stream, sampling in zip(streams, (stop, repeat, GREEDY), strict=True):
        session.generate(stream, [], sampling, 20)
    turns = finish(session)
    stopped, varied, plain = (turns[stream] for stream in streams)
    assert stopped.stop_reason is StopReason.STOP
    said = "".join(chr(token) for token in stopped.tokens if token < 128)
    assert said.endswith(text[3:6]) and text.startswith(said)
    assert len(set(varied.tokens.tolist())) == 20
    same(plain, free)


def test_penalties_need_an_engine_that_remembers():
    session = Session(ENGINE, PARAMS)
    (stream,) = session.open("main", PROMPTS[1], [0])
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.1.*penalties=True"):
        session.generate(stream, [], SamplingConfig(repetition_penalty=1.1), 5)


def test_a_row_cannot_outgrow_its_cache():
    pool = SlotPool(prompts=1, copies=1, prompt_tokens=64, suffix=10)
    session = Session(make_engine(pool, eos_ids=()), PARAMS)
    (stream,) = session.open("main", PROMPTS[0], [0])
    session.generate(stream, [65], SAMPLING, 7)
    finish(session)
    assert session.tokens_left(stream) == 2
    with pytest.raises(ValueError, match="room for 2 more tokens, not for 1 given and 2"):
        session.generate(stream, [65], SAMPLING, 2)
    session.generate(stream, [65], SAMPLING, 1)
    assert session.tokens_left(stream) == 0


def test_what_can_never_fit_is_refused_at_once():
    session = Session(ENGINE, PARAMS)
    with pytest.raises(ValueError, match="65 tokens and 1 copies does not fit pool 'main' of 64"):
        session.open("main", text_prompt("x" * (65 - len(text_prompt("").tokens))), [0])
    with pytest.raises(ValueError, match="3 copies does not fit"):
        session.open("main", PROMPTS[1], [0, 1, 2])


def test_streams_are_used_in_order():
    session = Session(ENGINE, PARAMS)
    (stream,) = session.open("main", PROMPTS[1], [0])
    session.generate(stream, [], SAMPLING, 5)
    with pytest.raises(ValueError, match="still generates"):
        session.generate(stream, [], SAMPLING, 5)
    session.close(stream)
    with pytest.raises(ValueError, match="closed"):
        session.generate(stream, [], SAMPLING, 5)
    assert session.generating == 0 and session.step() == []


def test_idle_streams_keep_their_slots():
    session = Session(
        make_engine(SlotPool(prompts=1, copies=1, prompt_tokens=64, suffix=9)), PARAMS
    )
    (idle,) = session.open("main", PROMPTS[1], [0])
    (waiting,) = session.open("main", PROMPTS[1], [1])
    session.step()
    session.generate(waiting, [], SAMPLING, 5)
    assert session.step() == [] and session.generating == 1
    session.close(idle)
    assert waiting in finish(session)


def test_cache_bytes_are_known_beforehand():
    for rung in range(len(PARTS)):
        engine = make_engine(grows_from=0)
        engine.caches.open(rung)
        caches = [state.cache for state in engine.caches.states.values()]
        held = [(c.prompt_keys, c.prompt_values, c.keys, c.values) for c in caches]
        assert engine.cache_bytes(rung) == sum(leaf.nbytes for leaf in jax.tree.leaves(held))


@pytest.mark.parametrize("field", ["prompts", "copies", "prompt_tokens", "suffix"])
def test_lanes_of_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        dataclasses.replace(POOL, **{field: 0})


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2", "data:3"])
def test_a_mesh_changes_no_sample(mesh):
    pool = SlotPool(prompts=6, copies=2, prompt_tokens=64, suffix=64)
    alone = sample_all(make_engine(pool), copies=2)
    count = 3 if mesh == "data:3" else 8
    with jax.set_mesh(make_mesh(parse_mesh(mesh, count), jax.devices()[:count])):
        spread = sample_all(make_engine(pool), copies=2)
    for one, other in zip(alone, spread, strict=True):
        same(one, other)


def qwen_engine(cache_dtype: str) -> Engine:
    policy = dataclasses.replace(QWEN, cache_dtype=cache_dtype)
    automata = TokenAutomata(CONTENTS, [IM_END])
    return Engine(policy, {"main": POOL}, automata=automata, pad_id=PAD)


def test_an_int8_cache_takes_a_quarter_and_its_scales():
    full, small = (qwen_engine(cache_dtype).cache_bytes() for cache_dtype in ("compute", "int8"))
    assert small == full * (1 / 4 + 1 / QWEN.config.text.head_dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "cache_dtype", "tolerance"),
    [
        (None, "compute", 1e-4),
        pytest.param("data:2,fsdp:2,tensor:2", "compute", 1e-4, marks=pytest.mark.study),
        # Wide against what was seen (0.02), narrow against what a wrong scale does.
        pytest.param(None, "int8", 0.1, marks=pytest.mark.study),
        ("data:2,fsdp:2,tensor:2", "int8", 0.1),
    ],
)
def test_qwen3_vl_log_probs_equal_the_learners(mesh, cache_dtype, tolerance):
    width = QWEN.config.vision.patch_values
    prompts = [
        image_prompt("what?", frames=3, patches=8, seed=1, values=width),
        image_prompt("and here", frames=2, patches=16, seed=2, values=width),
    ]
    params = initialise(QWEN.table, jax.random.key(0))
    engine = qwen_engine(cache_dtype)
    with contextlib.ExitStack() as stack:
        live = params
        if mesh is not None:
            devices = make_mesh(parse_mesh(mesh, 8))
            stack.enter_context(jax.set_mesh(devices))
            live = jax.device_put(params, param_shardings(QWEN.table, devices))
        session = Session(engine, live)
        streams = [s for at, p in enumerate(prompts) for s in session.open("main", p, [at, 7])]
        for stream in streams:
            session.generate(stream, [], SAMPLING, 12)
        first = finish(session)
        for row, stream in enumerate(streams):
            session.generate(stream, [65] * (3 * row), SAMPLING, 12)
        second = finish(session)
    for row, stream in enumerate(streams):
        one, two = first[stream], second[stream]
        tokens = [*one.tokens, *[65] * (3 * row), *two.tokens]
        expected = chosen_log_probs(prompts[row // 2], tokens, policy=QWEN, params=params)
        np.testing.assert_allclose(one.log_probs, expected[: len(one.tokens)], atol=tolerance)
        np.testing.assert_allclose(two.log_probs, expected[-len(two.tokens) :], atol=tolerance)
        assert expected.std() > 0.5


@pytest.mark.slow
def test_a_second_session_compiles_nothing():
    """Counted by XLA: jit compiles anew for arrays that are bound to devices and were not."""
    compiled = []

    def note(event, duration_secs, **_):
        compiled.append(event)

    params = initialise(QWEN.table, jax.random.key(0))
    automata = TokenAutomata([b""] * VOCAB, [], reserve=2)
    pools = {"main": SlotPool(1, 2, 64, 8)}
    engine = Engine(QWEN, pools, automata=automata, pad_id=0, steps_per_call=4)

    def say():
        session = Session(engine, params)
        for stream in session.open("main", text_prompt("x"), [1, 2]):
            session.generate(stream, [], SamplingConfig(), 4)
        session.step()

    say()
    jax.monitoring.register_event_duration_secs_listener(note)
    say()
    jax.monitoring.unregister_event_duration_listener(note)
    assert not [event for event in compiled if "compile/backend_compile" in event]
