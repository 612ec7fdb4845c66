"""Gathered, chunked log-probabilities equal the plain formula, gradient included."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax import log_probs
from paravt_jax.log_probs import View, gathered_log_probs, preceding, teacher_gap
from paravt_jax.mesh import constrain, make_mesh, parse_mesh, sharding, split_columns
from paravt_jax.shaping import DEAD, Shaping
from paravt_jax.shared_rows import Bounds, SharedRows

pytestmark = pytest.mark.slow

COLLECTIVE = re.compile(
    r"\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)\(.*while/body"
)
"""The sizes of what devices exchange in loops, in a compiled program's text."""
B, T, D, V = 3, 11, 5, 13
rng = np.random.default_rng(0)
HIDDEN = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
HEAD = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
TOKENS = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
CHOSEN = jnp.asarray(rng.random((B, T)) < 0.5).at[:, 0].set(False)
BEFORE = preceding(HIDDEN)


def plain(head, temperature):
    logits = HIDDEN[:, :-1] @ head / temperature
    table = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(table, TOKENS[:, 1:, None], axis=-1)[..., 0]
    entropy = -(jnp.exp(table) * table).sum(-1)
    keep = CHOSEN[:, 1:].astype(jnp.float32)
    pad = ((0, 0), (1, 0))
    return jnp.pad(picked * keep, pad), jnp.pad(entropy * keep, pad)


def assert_same(ours, wanted):
    """Log-probabilities and entropies, and the gradient of the first of them."""

    def both(function, head):
        return function(head), jax.grad(lambda head: function(head)[0].sum())(head)

    (found, slope), (want, steep) = jax.jit(functools.partial(both, ours))(HEAD), both(wanted, HEAD)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(slope, steep, atol=1e-4)


@pytest.mark.parametrize(("chunk", "lanes"), [(2, 1), (4, 1), (128, 1), (1, 3), (128, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_plain_formula(chunk, lanes, temperature):
    def ours(head):
        return gathered_log_probs(
            BEFORE,
            TOKENS,
            CHOSEN,
            lambda h: h @ head,
            temperature=temperature,
            budget=T,
            lanes=lanes,
            chunk=chunk,
        )

    assert_same(ours, lambda head: plain(head, temperature))


ROWS, LONG, WIDE, CHUNK = 8, 64, 16, 4


@pytest.mark.parametrize(
    "mesh", ["data:8", "fsdp:8", "tensor:8", "fsdp:4,tensor:2", "data:2,fsdp:4"]
)
@pytest.mark.parametrize("vocab", [512, 515])
def test_a_mesh_reads_the_head_once_whatever_the_chunks(mesh, vocab):
    """In the loop over chunks devices exchange rows, never the head or its gradient."""
    devices = make_mesh(parse_mesh(mesh, 8))
    dice = np.random.default_rng(1)
    kernel = jnp.asarray(dice.normal(size=(WIDE, vocab)), jnp.float32)
    hidden = jnp.asarray(dice.normal(size=(ROWS, LONG, WIDE)), jnp.float32)
    tokens = jnp.asarray(dice.integers(0, vocab, (ROWS, LONG)), jnp.int32)

    def slopes(kernel, hidden):
        def total(kernel, hidden):
            head = split_columns(jnp.matmul, lambda: constrain(kernel, "embed", "vocab"))
            settings = {"temperature": 0.7, "budget": LONG, "chunk": CHUNK}
            found, _ = gathered_log_probs(hidden, tokens, tokens >= 0, head, **settings)
            return jnp.sum(found * jnp.sin(tokens))

        value, (own, other) = jax.value_and_grad(total, (0, 1))(kernel, hidden)
        return value, constrain(own, "embed", "vocab"), constrain(other, "batch", None, None)

    want = jax.jit(slopes)(kernel, hidden)
    with jax.set_mesh(devices):
        kernel = jax.device_put(kernel, sharding(devices, ("embed", "vocab"), kernel.shape))
        hidden = jax.device_put(hidden, sharding(devices, ("batch", None, None), hidden.shape))
        compiled = jax.jit(slopes).lower(kernel, hidden).compile()
    for got, expected in zip(compiled(kernel, hidden), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    moved = [math.prod(map(int, x.split(","))) for x in COLLECTIVE.findall(compiled.as_text())]
    assert 0 < max(moved) <= ROWS * CHUNK * WIDE < WIDE * vocab / 8


@pytest.mark.parametrize(
    ("budget", "logits", "positions"),
    [(24, 0, 4), (9, 0, 3), (3, 0, 3), (999, 0, 4), (24, 4 * 99 * 6, 6), (24, 4 * 99 * 11, 8)],
)
def test_a_cpu_takes_even_pieces_of_few_logits(budget, logits, positions, monkeypatch):
    """At least twice the width, of all streams together."""
    monkeypatch.setattr(log_probs, "LOGITS_ON_CPU", logits)
    shapes = set()

    def head(x):
        shapes.add(x.shape)
        return jnp.zeros((*x.shape[:2], 99))

    hidden, tokens = jnp.zeros((4, 24, 8)), jnp.zeros((4, 24), jnp.int32)
    settings = {"head": head, "temperature": 1.0, "budget": budget}
    jax.eval_shape(lambda: gathered_log_probs(hidden, tokens, tokens == 0, **settings))
    assert max(shapes) == (4, positions, 8)


def test_the_head_is_not_kept_for_each_chunk():
    """There is no array of one head for each of the 16 chunks."""
    hidden, kernel = jnp.ones((2, 64, 16)), jnp.ones((16, 999))
    tokens = jnp.zeros((2, 64), jnp.int32)

    def total(hidden, kernel):
        settings = {"temperature": 1.0, "budget": 64, "chunk": 4}
        found, _ = gathered_log_probs(hidden, tokens, tokens == 0, lambda x: x @ kernel, **settings)
        return found.sum()

    text = jax.jit(jax.grad(total, (0, 1))).lower(hidden, kernel).compile().as_text()
    assert "f32[16,16,999]" not in text and "f32[16,999,16]" not in text
    assert "f32[16,999]" in text


def test_nothing_chosen_gives_zeros_and_finite_gradients():
    def total(head):
        none = jnp.zeros((B, T), bool)
        log_probs, _ = gathered_log_probs(
            BEFORE, TOKENS, none, lambda h: h @ head, temperature=1.0, budget=4
        )
        return log_probs.sum()

    value, slope = jax.value_and_grad(total)(HEAD)
    assert value == 0 and not slope.any()


SEEN_FROM = jnp.asarray([2, 0, 5], jnp.int32)
FLOORS = jnp.asarray(rng.choice([-np.inf, -2.0, -2.8], (B, T)), jnp.float32)
STATES = jnp.asarray(rng.integers(0, 3, (B, T)), jnp.int32)
TABLE = jnp.asarray(np.where(rng.random((3, V)) < 0.4, DEAD, 1), jnp.int16).at[0].set(0)


def shaped_logits(head, shaping):
    """Penalised and tempered, by loops over the stream."""
    logits = HIDDEN[:, :-1] @ head
    if shaping.penalty is not None:
        factors = np.ones((B, T - 1, V), np.float32)
        for row, at in np.ndindex(B, T - 1):
            said = TOKENS[row, SEEN_FROM[row] : at + 1]
            factors[row, at, said] = shaping.penalty
        logits = jnp.where(logits < 0, logits * factors, logits / factors)
    return logits / 0.7


def drawable(shaping):
    """Which tokens could be drawn: the same set for all weights."""
    inside = np.ones((B, T - 1, V), bool)
    if shaping.floors is not None:
        inside &= np.asarray(
            jax.nn.log_softmax(shaped_logits(HEAD, shaping)) >= FLOORS[:, 1:, None]
        )
    if shaping.grammar is not None:
        inside &= np.asarray(TABLE)[STATES[:, 1:]] != DEAD
    return inside | (np.asarray(jax.nn.one_hot(TOKENS[:, 1:], V)) > 0)


def shaped_plain(head, shaping, inside):
    table = jnp.where(inside, shaped_logits(head, shaping), -1e9)
    table -= jax.nn.logsumexp(table, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(table, TOKENS[:, 1:, None], axis=-1)[..., 0]
    entropy = -(jnp.exp(table) * table).sum(-1)
    keep = CHOSEN[:, 1:].astype(jnp.float32)
    return tuple(jnp.pad(x * keep, ((0, 0), (1, 0))) for x in (picked, entropy))


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(penalty=1.3, prompt_lengths=SEEN_FROM),
        Shaping(floors=FLOORS),
        Shaping(grammar=STATES, table=TABLE),
        Shaping(1.3, SEEN_FROM, FLOORS, STATES, TABLE),
    ],
    ids=["penalty", "truncation", "grammar", "all"],
)
@pytest.mark.parametrize("lanes", [1, 3])
def test_what_shaped_the_draws_shapes_value_and_gradient(shaping, lanes):
    def ours(head):
        return gathered_log_probs(
            BEFORE,
            TOKENS,
            CHOSEN,
            lambda h: h @ head,
            temperature=0.7,
            budget=T,
            lanes=lanes,
            chunk=4,
            shaping=shaping,
        )

    inside = drawable(shaping)
    assert_same(ours, lambda head: shaped_plain(head, shaping, inside))


def test_a_teacher_is_shaped_like_its_student():
    """Equal policies have no gap; a grammar that leaves one token leaves nothing to advise."""
    own = View(BEFORE, lambda h: h @ HEAD)
    other = View(BEFORE, lambda h: h @ (2 * HEAD))
    settings = {"support": 4, "temperature": 0.7, "budget": T, "chunk": 4}
    shaping = Shaping(1.3, SEEN_FROM, FLOORS, STATES, TABLE)
    assert not teacher_gap(own, own, TOKENS, CHOSEN, shaping=shaping, **settings).any()
    gaps = np.asarray(teacher_gap(other, own, TOKENS, CHOSEN, shaping=shaping, **settings))
    assert np.isfinite(gaps).all() and gaps.any()
    nothing_else = Shaping(grammar=STATES, table=jnp.full((3, V), DEAD, jnp.int16))
    assert not teacher_gap(other, own, TOKENS, CHOSEN, shaping=nothing_else, **settings).any()


# Logits of one prediction over four tokens, and the policy that will be compared with it.
TEACHER = jnp.log(jnp.array([[[0.5, 0.3, 0.15, 0.05]]]))
STUDENT = jnp.log(jnp.array([[[0.2, 0.4, 0.3, 0.1]]]))


def gap_at(token: int, support: int, full_weight: float = 0.0, temperature: float = 1.0) -> float:
    """The gap for one token, by identity heads: hidden states are the logits."""

    def view(logits):
        return View(jnp.zeros((1, 3, 4)).at[:, 1].set(logits[0]), lambda h: h)

    chosen = jnp.zeros((1, 3), bool).at[0, 1].set(True)
    tokens = jnp.zeros((1, 3), jnp.int32).at[0, 1].set(token)
    gaps = teacher_gap(
        view(TEACHER),
        view(STUDENT),
        tokens,
        chosen,
        support=support,
        full_weight=full_weight,
        temperature=temperature,
        budget=2,
    )
    assert gaps[0, 0] == gaps[0, 2] == 0
    return float(gaps[0, 1])


def test_gap_on_the_teachers_likeliest_tokens_by_hand():
    """S of two tokens is {0, 1}: teacher 5/8 and 3/8, student 2/6 and 4/6."""
    assert gap_at(0, 2) == pytest.approx(np.log((5 / 8) / (2 / 6)), abs=1e-6)
    assert gap_at(1, 2) == pytest.approx(np.log((3 / 8) / (4 / 6)), abs=1e-6)


def test_a_token_beyond_them_joins_them():
    """S is {0, 1, 3}: teacher 0.05 / 0.85, student 0.1 / 0.7."""
    assert gap_at(3, 2) == pytest.approx(np.log((0.05 / 0.85) / (0.1 / 0.7)), abs=1e-6)


def test_full_weight_goes_over_to_the_whole_vocabulary():
    whole = np.log(0.05 / 0.1)
    assert gap_at(3, 2, full_weight=1.0) == pytest.approx(whole, abs=1e-6)
    assert gap_at(3, 9) == pytest.approx(whole, abs=1e-6)
    half = 0.5 * whole + 0.5 * gap_at(3, 2)
    assert gap_at(3, 2, full_weight=0.5) == pytest.approx(half, abs=1e-6)


def test_gap_knows_the_temperature():
    teacher, student = (np.array([0.5, 0.3]) ** 2, np.array([0.2, 0.4]) ** 2)
    want = np.log((teacher[0] / teacher.sum()) / (student[0] / student.sum()))
    assert gap_at(0, 2, temperature=0.5) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("chunk", "lanes"), [(2, 1), (128, 1), (2, 3)])
def test_equal_policies_have_no_gap(chunk, lanes):
    own = View(BEFORE, lambda h: h @ HEAD)
    settings = {"support": 4, "budget": T, "chunk": chunk, "lanes": lanes}
    assert not teacher_gap(own, own, TOKENS, CHOSEN, temperature=0.7, **settings).any()
    other = View(BEFORE, lambda h: h @ (2 * HEAD))
    gaps = teacher_gap(other, own, TOKENS, CHOSEN, temperature=1.0, **settings)
    np.testing.assert_array_equal(gaps != 0, CHOSEN)


def test_what_predicts_the_first_tokens_of_streams_is_the_last_of_their_prompt():
    hidden, lengths = jnp.arange(14.0).reshape(2, 7, 1), jnp.array([2, 2, 1, 3])
    rows = SharedRows(jnp.array([3, 1]), jnp.array([3, 5, 1, 2]), lengths, Bounds(3, 3))
    found = preceding(hidden, rows)[..., 0]
    assert [row[:n].tolist() for row, n in zip(found, lengths, strict=True)] == [
        [2, 3], [2, 5], [7], [7, 9, 10]]  # fmt: skip
